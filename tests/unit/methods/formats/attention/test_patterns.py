"""Patterns of attention against sets that are written out token by token, and attention over those sets alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from slimbench.methods.compact.sparse_attention import BigBird as BigBirds
from slimbench.methods.compact.sparse_attention import BlockBERT, SparseTransformer
from slimbench.methods.compact.sparse_attention import Longformer as Longformers
from slimbench.methods.formats.attention.operators import pattern as operators
from slimbench.methods.formats.attention.patterns import BigBird, BlockBert, Fixed, Longformer, Pattern, Strided
from tests.unit.methods.formats.attention.support import draw, given, rotary, run, turned

HEADS, GROUPS, WIDTH, TOKENS = 4, 2, 16, 257


def strided(t: int, j: int, head: int) -> bool:
    return t - j < 16 or (t - j) % 16 == 0


def fixed(t: int, j: int, head: int) -> bool:
    return j // 16 == t // 16 or j % 16 >= 16 - 3


def longformer(t: int, j: int, head: int) -> bool:
    return (t - j) in {0, 2, 4, 6, 8} or j < 2


def blockbert(t: int, j: int, head: int) -> bool:
    block = t // 32 - head % 3
    return j // 32 == (block if block >= 0 else t // 32)


BIGBIRD = BigBird(8, 2, 1, 2, seed=5)


def bigbird(t: int, j: int, head: int) -> bool:
    row, column = t // 8, j // 8
    return row - column in {0, 1} or column == 0 or column in BIGBIRD.drawn(row, 0, head)


SETS: list[tuple[Pattern, Callable[[int, int, int], bool]]] = [
    (Strided(16), strided),
    (Fixed(16, 3), fixed),
    (Longformer(5, 2, 2), longformer),
    (BlockBert(32, 3), blockbert),
    (BIGBIRD, bigbird),
]


@pytest.mark.parametrize(("pattern", "rule"), SETS, ids=lambda part: getattr(part, "kind", ""))
def test_the_tokens_that_are_seen_are_those_of_the_definition(pattern: Pattern, rule: Callable[[int, int, int], bool]) -> None:
    at, total = torch.arange(TOKENS), 0
    seen = pattern.seen(at[:, None], at[None], 0, 6) & (at[None] <= at[:, None])
    for head in range(6):
        wanted = torch.tensor([[j <= t and rule(t, j, head) for j in range(TOKENS)] for t in range(TOKENS)])
        assert torch.equal(seen[head % len(seen)], wanted)
        assert wanted.any(1).all(), "no token sees nothing"
        total += int(wanted.sum())
    assert pattern.exact_keys(TOKENS) == round(total / 6), "the mean over heads"


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


class Sizes(TorchFunctionMode):
    """Numbers of elements of all that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.made += [part.numel() for part in (out if isinstance(out, tuple) else [out]) if isinstance(part, torch.Tensor)]
        return out


@pytest.mark.parametrize("pattern", [part for part, _ in SETS], ids=lambda part: part.kind)
def test_no_table_of_all_pairs_is_built_and_work_grows_with_their_number(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_QUERIES", 32)
    operator, whole = pattern.operator(rotary(WIDTH), WIDTH**-0.5, 0), []
    for tokens in (256, 512):
        with Sizes() as sizes:
            operator(*draw(1, HEADS, GROUPS, tokens, WIDTH), None)
        assert max(sizes.made) <= max(32 * tokens * HEADS, tokens * HEADS * WIDTH)
        whole.append(sum(sizes.made))
    assert whole[1] <= 5 * whole[0]
    with Sizes() as sizes:
        pattern.exact_keys(16_384)
    assert max(sizes.made) <= 16_384


@pytest.mark.parametrize(("pattern", "rule"), SETS, ids=lambda part: getattr(part, "kind", ""))
def test_one_token_reads_the_keys_that_it_sees_and_no_other(pattern: Pattern, rule: Callable[[int, int, int], bool]) -> None:
    operator = pattern.operator(rotary(WIDTH), WIDTH**-0.5, 0)
    with given() as read:
        run(operator, draw(2, HEADS, GROUPS, 130, WIDTH), [1] * 130)
    assert read == [max(sum(rule(t, j, head) for j in range(t + 1)) for head in range(HEADS)) for t in range(130)]


def test_random_blocks_are_earlier_ones_outside_window_and_beginning_and_differ() -> None:
    drawn = [BIGBIRD.drawn(20, layer, head) for layer in range(3) for head in range(3)]
    assert all(len(set(blocks)) == 2 and all(1 <= block <= 18 for block in blocks) for blocks in drawn)
    assert len(set(drawn)) > 4
    again, other = (BigBird(8, 2, 1, 2, seed=seed).drawn(20, 0, 0) for seed in (5, 6))
    assert drawn[0] == again != other
    assert len(BIGBIRD.drawn(2, 0, 0)) == 0, "between the beginning and the window there is none yet"


REFUSED = (lambda: Strided(0), lambda: Fixed(8, 0), lambda: Fixed(8, 8), lambda: Longformer(4, -1), lambda: BigBird(8, 0, 1, 1))


@pytest.mark.parametrize("make", REFUSED)
def test_settings_out_of_range_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        make()


def test_the_methods_are_these_policies() -> None:
    assert SparseTransformer().policy() == Strided(32)
    with pytest.raises(ValueError, match="summary is a setting of the pattern 'fixed'"):
        SparseTransformer(summary=2)
    assert SparseTransformer(pattern="fixed").policy() == Fixed(32, 4)
    assert Longformers().policy() == Longformer(128, 1)
    assert BigBirds(seed=2).policy(3) == BigBird(16, 3, 2, 3, seed=5)
    assert BlockBERT().policy() == BlockBert(128, 3)
