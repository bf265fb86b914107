"""Patterns of attention against sets that are written out token by token, and attention over those sets alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from slimbench.methods.compact.sparse_attention import BigBird as BigBirds
from slimbench.methods.compact.sparse_attention import BlockBERT, SparseTransformer
from slimbench.methods.compact.sparse_attention import Longformer as Longformers
from slimbench.methods.formats.attention.patterns import BigBird, BlockBert, Fixed, Longformer, Pattern, Strided
from tests.unit.methods.formats.attention.support import draw, rotary, run, turned

HEADS, GROUPS, WIDTH, TOKENS = 4, 2, 16, 257


def strided(t: int, j: int, head: int) -> bool:
    return t - j < 16 or (t - j) % 16 == 0


def fixed(t: int, j: int, head: int) -> bool:
    return j // 16 == t // 16 or j % 16 >= 16 - 3


def longformer(t: int, j: int, head: int) -> bool:
    return (t - j) in {0, 2, 4, 6, 8} or j < 2


def blockbert(t: int, j: int, head: int) -> bool:
    return j // 32 in {t // 32, t // 32 - head % 3}


BIGBIRD = BigBird(8, 2, 1, 2, seed=5)


def bigbird(t: int, j: int, head: int) -> bool:
    row, column = t // 8, j // 8
    return row - column in {0, 1} or column == 0 or column in BIGBIRD.drawn(row, 0, head).tolist()


SETS: list[tuple[Pattern, Callable[[int, int, int], bool]]] = [
    (Strided(16), strided),
    (Fixed(16, 3), fixed),
    (Longformer(5, 2, 2), longformer),
    (BlockBert(32, 3), blockbert),
    (BIGBIRD, bigbird),
]


@pytest.mark.parametrize(("pattern", "rule"), SETS, ids=lambda part: getattr(part, "kind", ""))
def test_the_tokens_that_are_seen_are_those_of_the_definition(pattern: Pattern, rule: Callable[[int, int, int], bool]) -> None:
    at = torch.arange(TOKENS)
    for head in range(3):
        seen = pattern.seen(at[:, None], at[None], 0, head) & (at[None] <= at[:, None])
        wanted = torch.tensor([[j <= t and rule(t, j, head) for j in range(TOKENS)] for t in range(TOKENS)])
        assert torch.equal(seen, wanted)
        if head == 0:
            assert pattern.exact_keys(TOKENS) == int(wanted.sum())


@pytest.mark.parametrize(("pattern", "rule"), SETS, ids=lambda part: getattr(part, "kind", ""))
def test_a_token_attends_to_these_and_no_other(pattern: Pattern, rule: Callable[[int, int, int], bool]) -> None:
    states = draw(1, HEADS, GROUPS, 80, WIDTH)
    operator = pattern.operator(rotary(WIDTH), WIDTH**-0.5, 0)
    whole, steps = run(operator, states, [80]), run(operator, states, [1] * 80)
    assert torch.allclose(whole, steps, atol=1e-5)
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        keys = torch.stack([turned(states[1][0, group, t], t) for t in range(80)])
        for token in (0, 17, 63, 79):
            seen = [j for j in range(token + 1) if rule(token, j, head)]
            weights = (keys[seen] @ turned(states[0][0, head, token], token) / math.sqrt(WIDTH)).softmax(0)
            assert torch.allclose(whole[0, head, token].double(), weights @ states[2][0, group, seen].double(), atol=1e-5)


def test_random_blocks_are_earlier_ones_outside_window_and_beginning_and_differ() -> None:
    drawn = [tuple(BIGBIRD.drawn(20, layer, head).tolist()) for layer in range(3) for head in range(3)]
    assert all(len(set(blocks)) == 2 and all(1 <= block <= 18 for block in blocks) for blocks in drawn)
    assert len(set(drawn)) > 4
    again, other = (tuple(BigBird(8, 2, 1, 2, seed=seed).drawn(20, 0, 0).tolist()) for seed in (5, 6))
    assert drawn[0] == again != other
    assert len(BIGBIRD.drawn(2, 0, 0)) == 0, "between the beginning and the window there is none yet"


@pytest.mark.parametrize("make", [lambda: Strided(0), lambda: Fixed(8, 0), lambda: Longformer(4, -1), lambda: BigBird(8, 0, 1, 1)])
def test_settings_out_of_range_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        make()


def test_the_methods_are_these_policies() -> None:
    assert SparseTransformer().policy() == Strided(32)
    assert SparseTransformer(pattern="fixed").policy() == Fixed(32, 4)
    assert Longformers().policy() == Longformer(128, 1)
    assert BigBirds(seed=2).policy(3) == BigBird(16, 3, 2, 3, seed=5)
    assert BlockBERT().policy() == BlockBert(128, 3)
