"""Policies on the real model: at their neutral settings they are the base, to rounding, and their own code runs."""

from __future__ import annotations

import base64
import copy
import json
import time
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
from slimbench.harness.measure.dynamic.drawn import RARE
from slimbench.harness.measure.dynamic.work import measure
from slimbench.harness.measure.loaded import label_logprobs
from slimbench.harness.schema.work import WorkResult
from slimbench.methods.core.learning.states import unrotated
from slimbench.methods.core.policies import PolicyMethod
from slimbench.methods.formats.attention.eviction import Eviction
from slimbench.methods.formats.attention.window import Window
from slimbench.methods.formats.depth.exit import EarlyExit
from slimbench.methods.formats.draft.policy import DraftPolicy, Exit, Lookup
from slimbench.methods.formats.draft.sampling import Sampling
from slimbench.methods.formats.policy import Policy
from tests.contract.test_policies import LEFT_OUT
from tests.parity import evictions
from tests.support.policies import as_long_as, far, fitted, under, watched
from tests.unit.measure.test_drawn import Credulous
from tests.unit.methods.formats.attention.support import run

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
    if reaching := as_long_as(POLICIES[name], LENGTH):
        assert far(logits(under(base, reaching), texts[:1]), plain[:1]) <= 1e-4, "what it does to any text leaves nothing out of this one"
    acting = under(base, POLICIES[name])
    assert far(logits(acting, texts[:1]), plain[:1]) > 1e-3


@pytest.mark.parametrize("name", sorted(FITTED))
def test_with_what_is_fitted_to_it_too_a_neutral_policy_is_the_model(name: str, base: Any, texts: Tensor, plain: Tensor) -> None:
    model = under(base, FITTED[name].neutral())
    calls = watched(model)
    found, wanted = logits(model, texts), plain[:1, :SHORT]
    assert len(calls) >= BLOCKS, "its own code ran in every block"
    assert far(found, plain) <= 1e-4
    assert torch.equal(found.argmax(-1), plain.argmax(-1))
    if reaching := as_long_as(FITTED[name], LENGTH):
        assert far(under(base, reaching).logits(texts[:1, :SHORT]), wanted) <= 1e-4
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


def test_behind_more_tokens_than_a_window_holds_keys_stand_at_their_places_in_the_cache(base: Any, texts: Tensor) -> None:
    """Tokens 600 to 700 under 4 + 508 in a late block, each written out in float64 from keys that nothing has rotated."""
    with torch.no_grad():
        states = unrotated(base, texts.reshape(1, -1)[:, :701])[20]
        operator = under(base, Window(4, 508)).module.model.layers[20].self_attn.operator
        found = run(operator, states, [512, 88, *[1] * 101])
    query, key, value = (part[0].double() for part in states)
    for token in range(600, 701):
        held = [*range(4), *range(token - 508, token + 1)]
        keys = at_places(base, key[:, held], torch.arange(len(held))).repeat_interleave(3, 0)
        asked = at_places(base, query[:, token : token + 1], torch.tensor([len(held) - 1]))
        weights = (asked @ keys.transpose(1, 2) / 8).softmax(-1)
        wanted = (weights @ value[:, held].repeat_interleave(3, 0))[:, 0]
        assert torch.allclose(found[0, :, token].double(), wanted, rtol=1e-4, atol=1e-4), token


def at_places(model: Any, states: Tensor, places: Tensor) -> Tensor:
    """R(place) x of each token [H, T, 64] in float64, by the formula."""
    angles = places[:, None] * model.config.rope_parameters["rope_theta"] ** (-torch.arange(32, dtype=torch.float64) / 32)
    low, high = states[..., :32], states[..., 32:]
    return torch.cat([low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()], -1)


@pytest.mark.parametrize("rule", ["snapkv", "tova", "knorm"])
def test_what_stays_of_a_prompt_is_what_kvpress_keeps(base: Any, smollm2: Path, rule: str) -> None:
    """In every head of every block; TOVA and L2 norms keep the newest token here whatever its score, as it has no successor yet.

    Of two keys whose norms are equal to six digits either may stay: what differs there is how a processor rounds.
    """
    recorded = json.loads(evictions.RECORD.read_text())
    same = heads = 0
    for ids, theirs in zip(evictions.prompts(smollm2), recorded["kept"][rule], strict=True):
        prompt = torch.tensor([ids])
        _, whole = under(base, Eviction(rule, 2 * len(ids))).extend(prompt)
        _, left = under(base, Eviction(rule, recorded["budget"])).extend(prompt)
        assert len(theirs) == BLOCKS
        for layer, rows in enumerate(theirs):
            all_keys, keys = (state.layers[layer].tensors_by_name["keys"][0] for state in (whole, left))
            for head, row in enumerate(rows):
                bits = int.from_bytes(base64.b64decode(row), "big")
                wanted = {place for place in range(len(ids)) if bits >> (len(ids) - 1 - place) & 1}
                found = set(torch.cdist(keys[head], all_keys[head]).argmin(1).tolist())
                assert len(found) == recorded["budget"]
                heads += 1
                norms = all_keys[head].double().norm(dim=-1)
                missing = norms[sorted(wanted - found)]
                odd = found - {len(ids) - 1} - wanted
                same += not odd or (rule == "knorm" and all((missing / norms[place] - 1).abs().min() < 1e-6 for place in odd))
    assert heads == 3 * BLOCKS * 3 and same == heads


def test_a_draft_that_is_always_wrong_makes_the_model_slower(base: Any, texts: Tensor) -> None:
    """Ten guesses a pass that are never taken, in turns with the model alone; what it writes stays the model's own."""
    module = copy.deepcopy(base)
    Lookup(10, 2).install(module)
    drafter = module.drafter
    drafter.guess_and_check = lambda text, cache, most: (wrong := [0] * min(10, most), drafter.chosen(text, wrong, cache))
    plain, wrong = TransformersModel(base, "cpu"), TransformersModel(module, "cpu")
    wrong.slots = ["draft"]
    taken: dict[str, list[float]] = {"plain": [], "wrong": []}
    for turn in range(4):
        written = []
        for name, model in (("plain", plain), ("wrong", wrong))[:: -1 if turn % 2 else 1]:
            step, began = model.prefill(texts[:1, :64], 33), time.perf_counter()
            tokens = [step.token]
            for _ in range(32):
                step = model.decode_step(step)
                tokens.append(step.token)
            taken[name].append(time.perf_counter() - began)
            written.append(torch.cat(tokens, 1))
        assert torch.equal(*written)
    found = measure(wrong, texts[:1, :64], None, lambda *_: None)
    assert found.passes == found.tokens and sum(found.text_accepted) == 0 and sum(found.text_drafted) > found.tokens
    assert min(taken["wrong"]) > 1.1 * min(taken["plain"])


@pytest.mark.parametrize("policy", [None, Lookup(10, 2), Exit(3, 20)], ids=["alone", "lookup", "exit"])
def test_what_it_draws_is_its_own_whatever_guesses(base: Any, texts: Tensor, policy: DraftPolicy | None) -> None:
    """256 tokens at a temperature of 1, over 49,152 words; where guesses stay unasked it shows."""

    def found(kind: type[Sampling]) -> WorkResult:
        module = copy.deepcopy(base)
        if policy:
            policy.install(module)
        model = TransformersModel(module, "cpu")
        model.slots = ["draft"] if policy else []
        model.draw(1.0)
        model._sampling = kind(1.0, model.device)
        if policy:
            module.drafter.sampling = model._sampling
        return measure(model, texts[:, :128], None, lambda *_: None, 65)

    honest = found(Sampling)
    assert honest.flags == [] and honest.drawn_p is not None and honest.drawn_p > RARE
    if policy:
        assert sum(honest.text_drafted) > 0 and honest.passes and honest.passes <= honest.tokens
        lie = found(Credulous)
        assert lie.drawn_p is not None and lie.drawn_p < RARE and any(flag.startswith("texts are not drawn") for flag in lie.flags)
