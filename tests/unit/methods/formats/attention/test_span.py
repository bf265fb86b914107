"""Adaptive spans against the paper's masked softmax, written out token by token, and what a layer keeps for them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from slimbench.methods.compact.attention_span import AdaptiveSpan
from slimbench.methods.formats.attention.operators.interface import Kept
from slimbench.methods.formats.attention.policy import ALL
from slimbench.methods.formats.attention.span import Span
from tests.unit.methods.formats.attention.support import draw, rotary, run, turned

HEADS, GROUPS, WIDTH, TOKENS = 4, 2, 16, 40
SPANS = [0.0, 3.0, 7.25, 12.5]
SIZES = [[TOKENS], [1] * TOKENS, [5, 1, 1, 20, 13]]


def policy(spans: list[float], ramp: int = 6) -> Span:
    return Span(ramp, {"0.span": torch.tensor(spans)})


def by_masks(query: Tensor, key: Tensor, value: Tensor, spans: list[float], ramp: int) -> Tensor:
    """Each weight is masked and divided by the sum of all masked ones."""
    found = torch.zeros_like(query)
    for row in range(len(query)):
        for head in range(query.shape[1]):
            group = head // (query.shape[1] // key.shape[1])
            for t in range(query.shape[2]):
                asked = turned(query[row, head, t], t)
                weights = []
                for j in range(t + 1):
                    masked = min(max((ramp + spans[head] - (t - j)) / ramp, 0.0), 1.0)
                    weights.append(masked * math.exp(float(asked @ turned(key[row, group, j], j)) / math.sqrt(WIDTH)))
                found[row, head, t] = sum(w / sum(weights) * value[row, group, j].double() for j, w in enumerate(weights))
    return found


@pytest.mark.parametrize("ramp", [1, 6])
@pytest.mark.parametrize("sizes", SIZES)
def test_weights_are_masked_by_distance_and_sum_to_one(ramp: int, sizes: list[int]) -> None:
    states = draw(2, HEADS, GROUPS, TOKENS, WIDTH)
    operator = policy(SPANS, ramp).operator(rotary(WIDTH), WIDTH**-0.5, 0)
    assert torch.allclose(run(operator, states, sizes), by_masks(*states, SPANS, ramp), atol=1e-4)


def test_a_long_text_in_one_piece_goes_through_in_parts() -> None:
    states = draw(1, HEADS, GROUPS, 600, WIDTH)
    operator = policy([0, 40, 80, 300], 32).operator(rotary(WIDTH), WIDTH**-0.5, 0)
    whole = run(operator, states, [600])
    assert torch.allclose(run(operator, states, [290, 1, 309]), whole, atol=1e-5)
    assert torch.allclose(operator(*states, None), whole, atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES)
def test_without_spans_and_with_endless_ones_it_is_the_base(sizes: list[int]) -> None:
    states = draw(2, HEADS, GROUPS, TOKENS, WIDTH)
    wanted = by_masks(*states, [1e9] * HEADS, 1)
    for made in (policy(SPANS).neutral(), policy([float(ALL)] * HEADS)):
        assert torch.allclose(run(made.operator(rotary(WIDTH), WIDTH**-0.5, 0), states, sizes), wanted, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("spans", "most"), [(SPANS, 18), ([0.0, 1.0, 2.0, 3.0], 8)])
def test_a_layer_keeps_what_its_longest_span_reaches_and_no_byte_more(groups: int, spans: list[float], most: int) -> None:
    operator, kept = policy(spans).operator(rotary(WIDTH), WIDTH**-0.5, 0), Kept()
    before = 0
    for tokens in (25, 1, 1, 4):
        states = draw(1, HEADS, groups, tokens, WIDTH, seed=before)
        run(operator, states, [tokens], kept)
        before += tokens
        assert sum(tensor.untyped_storage().nbytes() for tensor in kept.tensors) == 2 * groups * WIDTH * min(before, most) * 4


def test_spans_get_the_gradient_of_the_masked_softmax() -> None:
    query, key, value = draw(1, HEADS, GROUPS, TOKENS, WIDTH)
    spans = torch.nn.Parameter(torch.tensor(SPANS))
    operator = Span(6, {"0.span": spans}).operator(rotary(WIDTH), WIDTH**-0.5, 0)
    operator(query, key, value, None).square().sum().backward()
    step = 1e-3
    for head in range(HEADS):
        moved = [[z + sign * step * (place == head) for place, z in enumerate(SPANS)] for sign in (1, -1)]
        sums = [float(by_masks(query, key, value, z, 6).double().square().sum()) for z in moved]
        if head not in (0, 1):  # at whole numbers of the ramp the mask has a kink
            assert spans.grad is not None
            assert float(spans.grad[head]) == pytest.approx((sums[0] - sums[1]) / (2 * step), rel=0.02)
    assert spans.grad is not None and torch.isfinite(spans.grad).all()


def test_spans_that_learn_are_looked_at_anew() -> None:
    states = draw(1, HEADS, GROUPS, TOKENS, WIDTH)
    spans = torch.nn.Parameter(torch.zeros(HEADS))
    operator = Span(6, {"0.span": spans}).operator(rotary(WIDTH), WIDTH**-0.5, 0)
    spans.data = torch.tensor(SPANS)
    assert torch.allclose(operator(*states, None), by_masks(*states, SPANS, 6), atol=1e-4)


def test_pairs_left_alone_lie_before_the_ramp() -> None:
    for tokens in (1, 5, 40):
        left = sum(t - j <= z for z in SPANS for t in range(tokens) for j in range(t + 1))
        assert policy(SPANS).exact_keys(tokens) == left // HEADS
        assert policy(SPANS).neutral().exact_keys(tokens) == tokens * (tokens + 1) // 2


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="ramp must be at least 1"):
        Span(0)
    with pytest.raises(ValueError, match="spans must not be negative"):
        policy([1, -1, 1, 1])


def test_the_method_is_this_policy() -> None:
    assert AdaptiveSpan().policy() == Span(32)
