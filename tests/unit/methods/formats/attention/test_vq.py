"""Codes in place of old keys against sums over tokens that are written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from slimbench.methods.compact.vq_attention import TransformerVQ
from slimbench.methods.formats.attention.operators.interface import Kept
from slimbench.methods.formats.attention.vq import VQ
from tests.unit.methods.formats.attention.support import States, draw, rotary, run, turned

HEADS, GROUPS, WIDTH, TOKENS, CODES = 4, 2, 16, 43, 5
PIECES = [[TOKENS], [1] * TOKENS, [5, 1, 1, 20, 16]]


def books(layer: int = 0, codes: int = CODES) -> dict[str, Tensor]:
    return {f"{layer}.codes": torch.randn(GROUPS, codes, WIDTH, generator=torch.Generator().manual_seed(3)) * 1.5}


def by_tokens(states: States, exact: int, codes: Tensor) -> Tensor:
    """Each old token is weighed by the score of its code, `exact` tokens before the query: no numbers and means are needed."""
    query, key, value = (part.double() for part in states)
    found = torch.zeros_like(query)
    for row in range(len(query)):
        for head in range(query.shape[1]):
            group = head // (query.shape[1] // key.shape[1])
            mine = codes[group].double()
            coded = [mine[int((mine - key[row, group, j]).norm(dim=1).argmin())] for j in range(query.shape[2])]
            for t in range(query.shape[2]):
                asked = turned(query[row, head, t], t)
                seen = [turned(key[row, group, j], j) if j > t - exact else turned(coded[j], t - exact) for j in range(t + 1)]
                weights = (torch.stack(seen) @ asked / math.sqrt(WIDTH)).softmax(0)
                found[row, head, t] = weights @ value[row, group, : t + 1]
    return found


@pytest.mark.parametrize("exact", [1, 7, 42, 64])
@pytest.mark.parametrize("sizes", PIECES)
def test_old_tokens_are_seen_through_their_codes(exact: int, sizes: list[int]) -> None:
    states, made = draw(2, HEADS, GROUPS, TOKENS, WIDTH), books()
    found = run(VQ(exact, made).operator(rotary(WIDTH), WIDTH**-0.5, 0), states, sizes)
    assert torch.allclose(found.double(), by_tokens(states, exact, made["0.codes"]), atol=1e-4)


def test_numbers_and_means_of_codes_are_enough() -> None:
    states, made, exact, t = draw(1, HEADS, GROUPS, TOKENS, WIDTH), books()["0.codes"].double(), 7, TOKENS - 1
    found = run(VQ(exact, books()).operator(rotary(WIDTH), WIDTH**-0.5, 0), states, [TOKENS])
    query, key, value = (part[0].double() for part in states)
    for head in range(HEADS):
        group, asked = head // 2, turned(query[head, t], t)
        nearest = [int((made[group] - key[group, j]).norm(dim=1).argmin()) for j in range(t - exact + 1)]
        total, weight = torch.zeros(WIDTH, dtype=torch.float64), 0.0
        for s in sorted(set(nearest)):
            mean = torch.stack([value[group, j] for j, code in enumerate(nearest) if code == s]).mean(0)
            share = nearest.count(s) * math.exp(float(asked @ turned(made[group, s], t - exact)) / math.sqrt(WIDTH))
            total, weight = total + share * mean, weight + share
        for j in range(t - exact + 1, t + 1):
            share = math.exp(float(asked @ turned(key[group, j], j)) / math.sqrt(WIDTH))
            total, weight = total + share * value[group, j], weight + share
        assert torch.allclose(found[0, head, t].double(), total / weight, atol=1e-4)


def test_a_long_text_in_one_piece_goes_through_in_parts() -> None:
    states = draw(1, HEADS, GROUPS, 400, WIDTH)
    operator = VQ(50, books()).operator(rotary(WIDTH), WIDTH**-0.5, 0)
    whole = run(operator, states, [400])
    assert torch.allclose(whole, run(operator, states, [1] * 400), atol=1e-4)
    assert torch.allclose(whole, operator(*states, None), atol=1e-6)


@pytest.mark.parametrize("sizes", PIECES)
@pytest.mark.parametrize("made", [{}, books()])
def test_at_its_neutral_setting_all_is_exact(sizes: list[int], made: dict[str, Tensor]) -> None:
    states, policy = draw(1, HEADS, GROUPS, TOKENS, WIDTH), VQ(7, made).neutral()
    found = run(policy.operator(rotary(WIDTH), WIDTH**-0.5, 0), states, sizes)
    assert torch.allclose(found.double(), by_tokens(states, TOKENS, books()["0.codes"]), atol=1e-5)


@pytest.mark.parametrize("exact", [1, 7])
@pytest.mark.parametrize("tokens", [TOKENS, 3 * TOKENS])
def test_what_is_kept_does_not_grow(exact: int, tokens: int) -> None:
    for sizes in ([tokens], [tokens - 3, 1, 1, 1]):
        kept = Kept()
        run(VQ(exact, books()).operator(rotary(WIDTH), WIDTH**-0.5, 0), draw(1, HEADS, GROUPS, tokens, WIDTH), sizes, kept)
        newest = GROUPS * (exact - 1) * (2 * WIDTH * 4 + 2)
        assert sum(tensor.untyped_storage().nbytes() for tensor in kept.tensors) == newest + GROUPS * CODES * (WIDTH + 1) * 4


def test_what_is_kept_is_never_changed_in_place() -> None:
    operator, kept = VQ(4, books()).operator(rotary(WIDTH), WIDTH**-0.5, 0), Kept()
    states = [part.split([21, 9], 2) for part in draw(1, HEADS, GROUPS, 30, WIDTH)]
    early, late = zip(*states, strict=True)
    run(operator, early, [21], kept)
    before = kept.snapshot()
    first = run(operator, late, [4, 5], kept)
    kept.restore(before)
    assert torch.equal(run(operator, late, [4, 5], kept), first)


def test_each_layer_has_its_book_and_one_without_is_refused() -> None:
    both = books(0) | books(1, 3)
    assert [VQ(4, both).operator(rotary(WIDTH), 1.0, layer).codes.shape[1] for layer in (0, 1)] == [CODES, 3]
    with pytest.raises(ValueError, match="no codes for this layer"):
        VQ(4, both).operator(rotary(WIDTH), 1.0, 2)


def test_pairs_left_alone_are_those_of_the_window() -> None:
    for tokens in (1, 6, 7, 8, 40):
        assert VQ(7).exact_keys(tokens) == sum(t - j < 7 for t in range(tokens) for j in range(t + 1))


def test_a_window_without_the_token_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="exact must be at least 1"):
        VQ(0)


def test_the_method_is_this_policy() -> None:
    assert TransformerVQ().policy() == VQ(256)
