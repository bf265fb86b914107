"""Policies on the real model: at their neutral settings they are the base, to rounding, and their own code runs."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimbench.harness.config.registry import entries
from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure import perplexity
from slimbench.harness.measure.loaded import label_logprobs
from slimbench.methods.core.policies import PolicyMethod
from slimbench.methods.formats.depth.exit import EarlyExit
from slimbench.methods.formats.policy import Policy
from tests.contract.test_policies import LEFT_OUT
from tests.support.policies import far, fitted, under, watched

pytestmark = [pytest.mark.integration, pytest.mark.full]

TEXTS, LENGTH, BUDGET, BLOCKS = 4, 512, 96, 30
SHORT = 256
"""Tokens of the text on which policies with drawn tensors are tried."""
FEWEST = 20


def one_of_each() -> dict[str, Policy]:
    """The policy of every method that trains nothing, small enough to act on a text of `LENGTH` tokens."""
    found: dict[str, Policy] = {"early-exit": EarlyExit("margin", 0.3, (10, 20))}
    for entry in entries():
        method: Any = entry.method
        if not isinstance(method, PolicyMethod) or method.name in LEFT_OUT["everything"]:
            continue
        names = {field.name for field in fields(method)}
        small = {"budget": BUDGET, "residual_length": 32} | ({"shortest": 64, "block": 32, "samples": 32} if "shortest" in names else {})
        found[entry.name] = replace(method, **{name: value for name, value in small.items() if name in names}).policy()
    return found


POLICIES = one_of_each()
FITTED = fitted(BLOCKS, 576, 9, 3)


@pytest.fixture(scope="module")
def base(smollm2: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def texts(smollm2: Path) -> Tensor:
    stream, _ = perplexity.token_stream("bigbench-mysteries", AutoTokenizer.from_pretrained(smollm2))
    return torch.from_numpy(stream[: TEXTS * LENGTH].astype("int64")).view(TEXTS, LENGTH)


@pytest.fixture(scope="module")
def plain(base: Any, texts: Tensor) -> Tensor:
    return TransformersModel(base, "cpu").logits(texts)


def logits(model: TransformersModel, ids: Tensor) -> Tensor:
    """Logits of all tokens [B, LENGTH, V]: at once, or a prompt at once and what follows as the policy asks."""
    if model.scoring in ("exact", "chunk"):
        return torch.cat([model.logits(part) for part in ids.split(model.max_batch or len(ids))])
    prompt = LENGTH - 48 if model.scoring == "step" else LENGTH // 2
    first, state = model.extend(ids[:, :prompt])
    parts, rest = [first], ids[:, prompt:]
    for piece in rest.split(1 if model.scoring == "step" else rest.shape[1], 1):
        found, state = model.extend(piece, state)
        parts.append(found)
    return torch.cat(parts, 1)


def test_there_are_enough_of_them() -> None:
    assert len(POLICIES) >= FEWEST


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_neutral_policy_is_the_model_at_all_positions_and_one_in_force_is_not(name: str, base: Any, texts: Tensor, plain: Tensor) -> None:
    model = under(base, POLICIES[name].neutral())
    calls = watched(model)
    found = logits(model, texts)
    assert len(calls) >= BLOCKS, "its own code ran in every block"
    assert far(found, plain) <= 1e-4
    assert torch.equal(found.argmax(-1), plain.argmax(-1))
    acting = under(base, POLICIES[name])
    assert far(logits(acting, texts[:1]), plain[:1]) > 1e-3


@pytest.mark.parametrize("name", sorted(FITTED))
def test_with_what_is_fitted_to_it_too_a_neutral_policy_is_the_model(name: str, base: Any, texts: Tensor, plain: Tensor) -> None:
    model = under(base, FITTED[name].neutral())
    calls = watched(model)
    found, wanted = model.logits(texts[:1, :SHORT]), plain[:1, :SHORT]
    assert len(calls) >= BLOCKS, "its own code ran in every block"
    assert far(found, wanted) <= 1e-4
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))
    assert far(under(base, FITTED[name]).logits(texts[:1, :SHORT]), wanted) > 1e-3


def test_tokens_one_by_one_leave_where_they_leave_together(base: Any, texts: Tensor) -> None:
    """In float32: in bfloat16 rounding decides where an exit is nearly as sure as it must be."""
    model, ids = under(base, EarlyExit("margin", 0.3, (10, 20), sinks=1)), texts[:1, :SHORT]
    count = model.module.base_model.exits.left
    whole = model.token_logprobs(ids)
    together = dict(count)
    count.clear()
    parts, state = [], None
    for token in ids.split(1, 1):
        found, state = model.extend(token, state)
        parts.append(found)
    stepped = label_logprobs(torch.cat(parts, 1)[:, :-1], ids[:, 1:])
    assert dict(count) == together and len(together) == 3, "some leave at either exit, some do not"
    assert float((stepped.mean() - whole.mean()).abs()) <= 1e-3
