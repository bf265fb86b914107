"""Attention to summaries against sums over tokens that are written out, and what is kept of old tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.methods.compact.pooled_attention import BPTransformer, Combiner, Linformer
from slimbench.methods.formats.attention.operators.interface import Kept
from slimbench.methods.formats.attention.pooled import Pooled, Pooling
from tests.unit.methods.formats.attention.support import States, draw, rotary, run, turned

HEADS, GROUPS, WIDTH, TOKENS = 4, 2, 16, 43
PIECES = [[TOKENS], [1] * TOKENS, [5, 1, 1, 20, 16], [8, 8, 8, 8, 8, 3]]
Seen = tuple[Tensor, Tensor]
"""A rotated key and a value, in float64."""


def attended(asked: Tensor, seen: list[Seen]) -> Tensor:
    """Softmax attention of a rotated query."""
    scores = torch.stack([asked @ key for key, _ in seen]) / math.sqrt(WIDTH)
    return scores.softmax(0) @ torch.stack([value for _, value in seen])


def by_tokens(states: States, earlier: Callable[[int, int, Any], tuple[int, list[Seen]]]) -> Tensor:
    """Each token with all since some position, and what `earlier` says of the token's past before it, for a head of queries."""
    query, key, value = (part.double() for part in states)
    found = torch.zeros_like(query)
    for row in range(len(query)):
        for head in range(query.shape[1]):
            group = head // (query.shape[1] // key.shape[1])
            own = query[row, head], key[row, group], value[row, group]
            for t in range(query.shape[2]):
                begin, seen = earlier(t, head, own)
                singly = [(turned(own[1][j], j), own[2][j]) for j in range(begin, t + 1)]
                found[row, head, t] = attended(turned(own[0][t], t), seen + singly)
    return found


def projections(block: int, summaries: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {f"0.{which}": torch.randn(summaries, block, generator=generator) / block**0.5 for which in ("keys", "values")}


def linformer(block: int, summaries: int, weights: dict[str, Tensor]) -> Callable[[int, int, Any], tuple[int, list[Seen]]]:
    stretch = block // summaries

    def earlier(t: int, head: int, own: Any) -> tuple[int, list[Seen]]:
        begin, seen = t - t % block, []
        for first in range(0, begin, block):
            for i in range(summaries):
                if weights:
                    e, f = weights["0.keys"][i].double(), weights["0.values"][i].double()
                else:
                    e = f = torch.tensor([1 / stretch if j // stretch == i else 0.0 for j in range(block)], dtype=torch.float64)
                key, value = e @ own[1][first : first + block], f @ own[2][first : first + block]
                seen.append((turned(key, first + i * stretch + stretch // 2), value))
        return begin, seen

    return earlier


def combiner(block: int) -> Callable[[int, int, Any], tuple[int, list[Seen]]]:
    def earlier(t: int, head: int, own: Any) -> tuple[int, list[Seen]]:
        begin, seen = t - t % block, []
        for first in range(0, begin, block):
            inside = range(first, first + block)
            asked, key = (part[first : first + block].mean(0) for part in own[:2])
            local = attended(turned(asked, first + block // 2), [(turned(own[1][j], j), own[2][j]) for j in inside])
            seen.append((turned(key, first + block // 2), local))
        return begin, seen

    return earlier


def spans(count: int) -> Callable[[int, int, Any], tuple[int, list[Seen]]]:
    def earlier(t: int, head: int, own: Any) -> tuple[int, list[Seen]]:
        begin = left = max(0, t - count)
        seen = []
        for length in (2**level for level in range(1, 8) for _ in range(count)):
            if not left:
                break
            taken = length if left % length == 0 else length // 2
            left -= taken
            key, value = (part[left : left + taken].mean(0) for part in own[1:])
            seen.append((turned(key, left + taken // 2), value))
        assert not left
        return begin, seen

    return earlier


CASES: list[tuple[Pooled, Any]] = [
    (Pooled("projection", 8, 2), linformer(8, 2, {})),
    (Pooled("projection", 8, 4, projections(8, 4)), linformer(8, 4, projections(8, 4))),
    (Pooled("projection", 1, 1), linformer(1, 1, {})),
    (Pooled("projection", 64, 8), linformer(64, 8, {})),
    (Pooled("combiner", 8), combiner(8)),
    (Pooled("combiner", 5), combiner(5)),
    (Pooled("spans", 1), spans(1)),
    (Pooled("spans", 2), spans(2)),
    (Pooled("spans", 3), spans(3)),
    (Pooled("spans", 64), spans(64)),
]
NAMES = [f"{policy.pooling}-{policy.block}-{policy.summaries}" for policy, _ in CASES]


@pytest.fixture(scope="module")
def wanted() -> dict[str, Tensor]:
    """By name of a case the result for one drawn text."""
    states = draw(2, HEADS, GROUPS, TOKENS, WIDTH)
    return {name: by_tokens(states, earlier) for name, (_, earlier) in zip(NAMES, CASES, strict=True)}


@pytest.mark.parametrize(("policy", "name"), [(policy, name) for name, (policy, _) in zip(NAMES, CASES, strict=True)], ids=NAMES)
@pytest.mark.parametrize("sizes", PIECES)
def test_a_token_sees_its_own_part_and_summaries_of_earlier_ones(policy: Pooled, name: str, sizes: list[int], wanted: Any) -> None:
    found = run(policy.operator(rotary(WIDTH), WIDTH**-0.5, 0), draw(2, HEADS, GROUPS, TOKENS, WIDTH), sizes)
    assert torch.allclose(found.double(), wanted[name], atol=1e-4)


@pytest.mark.parametrize("policy", [Pooled("projection", 16, 4), Pooled("combiner", 48), Pooled("spans", 5)], ids=lambda p: p.pooling)
def test_a_long_text_in_one_piece_goes_through_in_parts(policy: Pooled) -> None:
    states, operator = draw(1, HEADS, GROUPS, 700, WIDTH), policy.operator(rotary(WIDTH), WIDTH**-0.5, 0)
    whole = run(operator, states, [700])
    assert torch.allclose(run(operator, states, [1] * 700), whole, atol=1e-4)
    assert torch.allclose(operator(*states, None), whole, atol=1e-6)


@pytest.mark.parametrize("policy", [Pooled("projection", 8, 4), Pooled("combiner", 8), Pooled("spans", 2)], ids=lambda p: p.pooling)
@pytest.mark.parametrize("sizes", PIECES)
def test_at_its_neutral_setting_a_token_sees_all_singly(policy: Pooled, sizes: list[int]) -> None:
    states = draw(1, HEADS, GROUPS, TOKENS, WIDTH)
    found = run(policy.neutral().operator(rotary(WIDTH), WIDTH**-0.5, 0), states, sizes)
    assert torch.allclose(found.double(), by_tokens(states, lambda t, head, own: (0, [])), atol=1e-5)
    assert policy.neutral().exact_keys(TOKENS) == TOKENS * (TOKENS + 1) // 2


def held(policy: Pooled, sizes: list[int], groups: int) -> list[Tensor]:
    kept = Kept()
    run(policy.operator(rotary(WIDTH), WIDTH**-0.5, 0), draw(1, HEADS, groups, sum(sizes), WIDTH), sizes, kept)
    return kept.tensors


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("sizes", [[TOKENS], [1] * TOKENS, [40], [17, 20, 3]])
def test_of_whole_blocks_the_summaries_are_kept_and_no_byte_more(sizes: list[int], groups: int) -> None:
    blocks, rest = divmod(sum(sizes), 8)
    numbers = {
        Pooled("projection", 8, 2): 2 * groups * WIDTH * (2 * blocks + rest),
        Pooled("combiner", 8): WIDTH * ((groups + HEADS) * blocks + 2 * groups * rest + (HEADS if rest else 0)),
    }
    for policy, number in numbers.items():
        assert sum(tensor.untyped_storage().nbytes() for tensor in held(policy, sizes, groups)) == 4 * number


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_spans_that_no_later_token_sees_are_dropped(count: int, groups: int) -> None:
    for tokens in (1, 10, 300, 301, 1027):
        for sizes in ([tokens], [tokens - 1, 1] if tokens > 1 else [1]):
            tensors = held(Pooled("spans", count), sizes, groups)
            assert len(tensors) == 2 * tokens.bit_length()
            assert all(1 <= tensor.shape[2] <= 2 * count + 1 for tensor in tensors)
            size = sum(tensor.shape[2] for tensor in tensors) * groups * WIDTH * 4
            assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == size


@pytest.mark.parametrize(("policy", "earlier"), CASES, ids=NAMES)
def test_pairs_left_alone_are_those_of_single_tokens(policy: Pooled, earlier: Any) -> None:
    index = torch.arange(TOKENS, dtype=torch.float64)[:, None].expand(-1, WIDTH)
    own, count = (index, index, index), 0
    for t in range(TOKENS):
        begin, seen = earlier(t, 0, own)
        count += t + 1 - begin
        if policy.pooling == "spans" and seen and begin % 2:
            count += 1
        assert policy.exact_keys(t + 1) == count


@pytest.mark.parametrize("kind", ["projection", "combiner", "spans"])
def test_what_is_kept_is_never_changed_in_place(kind: Pooling) -> None:
    policy, kept = Pooled(kind, 4, 2 if kind == "projection" else 1), Kept()
    operator, states = policy.operator(rotary(WIDTH), WIDTH**-0.5, 0), draw(1, HEADS, GROUPS, 30, WIDTH)
    run(operator, tuple(part[:, :, :21] for part in states), [21], kept)  # type: ignore[arg-type]
    before = kept.snapshot()
    first = run(operator, tuple(part[:, :, 21:] for part in states), [4, 5], kept)  # type: ignore[arg-type]
    kept.restore(before)
    assert torch.equal(run(operator, tuple(part[:, :, 21:] for part in states), [4, 5], kept), first)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [("projection", 0), ("projection", 8, 0), ("projection", 8, 3), ("combiner", 8, 2), ("spans", 0)])
def test_settings_out_of_range_are_refused(settings: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Pooled(*settings)


def test_the_methods_are_these_policies() -> None:
    assert Linformer().policy() == Pooled("projection", 32, 8)
    assert Combiner().policy() == Pooled("combiner", 32) and BPTransformer().policy() == Pooled("spans", 16)
