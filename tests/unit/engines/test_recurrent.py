"""Models that keep a state of constant size: the same numbers in steps as at once, and bytes that do not grow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slimbench.harness.engines.transformers import TransformersModel


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8)
    return TransformersModel(MambaForCausalLM(config).eval(), "cpu")


def text() -> torch.Tensor:
    return torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sizes", [[24], [1] * 24, [10, 1, 5, 8]])
def test_a_text_gives_the_same_in_pieces(model: Any, sizes: list[int]) -> None:
    parts, state = [], None
    for piece in text().split(sizes, 1):
        found, state = model.extend(piece, state)
        parts.append(found)
    assert torch.allclose(torch.cat(parts, 1), model.logits(text()), atol=1e-4)


def test_its_steps_are_those_of_the_library(model: Any) -> None:
    ids = text()[:1]
    wanted = model.module.generate(ids, max_new_tokens=8, do_sample=False)[0, 24:].tolist()
    assert model.generate(ids, 8)[0][: len(wanted)] == wanted


def test_the_state_does_not_grow(model: Any) -> None:
    sizes = [model.cache_bytes(model.prefill(text()[:, :tokens]).state) for tokens in (8, 16, 24)]
    assert sizes[0] and len(set(sizes)) == 1
