"""Linear attention against sums that are written out token by token, and features against their papers' formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.methods.compact.linear_attention import LearnedLinear, LinearAttention, Performer
from slimbench.methods.formats.attention.linear import Linear
from slimbench.methods.formats.attention.operators.interface import Kept
from slimbench.methods.formats.attention.operators.linear import LinearOperator, Unturned, independent, orthogonal
from tests.unit.methods.formats.attention.support import draw, rotary, run, turned

HEADS, GROUPS, WIDTH, TOKENS = 4, 2, 16, 40


def maps(gate: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    made = {name: torch.randn(HEADS, WIDTH, WIDTH, generator=generator) / 4 for name in ("0.query", "0.key")}
    made |= {f"{name}_bias": torch.randn(HEADS, WIDTH, generator=generator) / 4 for name in ("0.query", "0.key")}
    return made | ({"0.gate": torch.randn(HEADS, generator=generator)} if gate else {})


def policy(feature: Any, window: int) -> Linear:
    return Linear(feature, window, 24, 3, maps(window > 0) if feature in ("relu", "hedgehog") else {})


def phi(feature: str, x: Tensor, weights: tuple[Tensor, Tensor] | None, omega: Tensor) -> Tensor:
    """Features of one rotated vector in float64."""
    if feature == "elu":
        return torch.where(x > 0, x + 1, x.exp())
    if weights is not None:
        moved = x @ weights[0].double()
        if feature == "relu":
            return (moved + weights[1].double()).clamp(min=1e-12)
        return torch.cat([moved.softmax(0), (-moved).softmax(0)])
    x = x / WIDTH**0.25
    projected, half = omega.double() @ x, (x @ x) / 2
    if feature == "positive":
        made = (projected - half).exp()
        return (made + 1e-6 * made.max()) / math.sqrt(len(omega))
    return half.exp() * torch.cat([projected.cos(), projected.sin()]) / math.sqrt(len(omega))


def by_sums(made: Linear, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    found = torch.zeros_like(query, dtype=torch.float64)
    omega = (independent if made.feature == "fourier" else orthogonal)(made.features, WIDTH, made.seed * 1_000_003)
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        keys = [turned(key[0, group, j], j) for j in range(TOKENS)]
        own_q, own_k = (
            (made.maps[f"0.{which}"][head], made.maps[f"0.{which}_bias"][head]) if made.maps else None for which in ("query", "key")
        )
        for t in range(TOKENS):
            asked = turned(query[0, head, t], t)
            near = [j for j in range(t + 1) if j > t - made.window]
            far = [j for j in range(t + 1) if j <= t - made.window]
            if made.feature == "efficient":
                share = asked.softmax(0)
                grown = torch.stack([keys[j].exp() for j in far])
                spread = grown / grown.sum(0)
                found[0, head, t] = sum((share @ spread[j]) * value[0, group, j].double() for j in far)
                continue
            weights = {j: float(phi(made.feature, asked, own_q, omega) @ phi(made.feature, keys[j], own_k, omega)) for j in far}
            if near:
                products = {j: float(asked @ keys[j]) / math.sqrt(WIDTH) for j in near}
                open_ = float(torch.sigmoid(made.maps["0.gate"][head]))
                weights |= {j: open_ * math.exp(product - max(products.values())) for j, product in products.items()}
            found[0, head, t] = sum(w * value[0, group, j].double() for j, w in weights.items()) / sum(weights.values())
    return found


CASES = [("elu", 0), ("efficient", 0), ("positive", 0), ("relu", 0), ("relu", 7), ("hedgehog", 0), ("hedgehog", 7), ("hedgehog", 64)]


@pytest.mark.parametrize(("feature", "window"), CASES)
@pytest.mark.parametrize("sizes", [[TOKENS], [1] * TOKENS, [5, 1, 1, 20, 13]])
def test_state_chunks_and_sums_are_one(feature: str, window: int, sizes: list[int]) -> None:
    states, made = draw(1, HEADS, GROUPS, TOKENS, WIDTH), policy(feature, window)
    found = run(made.operator(rotary(WIDTH), WIDTH**-0.5, 0), states, sizes)
    assert torch.allclose(found.double(), by_sums(made, *states), atol=2e-4)


def test_sines_and_cosines_too_where_their_sums_are_not_near_zero() -> None:
    query, key, value = draw(1, HEADS, GROUPS, TOKENS, WIDTH)
    states, made = (query / 4, key / 4, value), policy("fourier", 0)
    found = run(made.operator(rotary(WIDTH), WIDTH**-0.5, 0), states, [5, 1, 1, 20, 13])
    assert torch.allclose(found.double(), by_sums(made, *states), atol=2e-4)


@pytest.mark.parametrize("feature", ["positive", "fourier"])
def test_features_give_the_kernel_of_softmax_on_average(feature: str) -> None:
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1)) * 0.4
    wanted = (x @ x.T / math.sqrt(WIDTH)).exp()
    drawn = []
    for seed in range(64):
        operator = LinearOperator(Unturned(), WIDTH**-0.5, feature, 0, (64, seed), {})
        made, logs = operator.features(x[None, None], "key")
        drawn.append((made * logs.exp())[0, 0] @ (made * logs.exp())[0, 0].T)
    several = torch.stack(drawn)
    error = several.std(0) / 8
    assert ((several.mean(0) - wanted).abs() <= 3.5 * error + 1e-4).all()


def test_directions_are_orthogonal_in_blocks_and_as_long_as_normal_vectors() -> None:
    rows = orthogonal(2000, WIDTH, 0)
    block = rows[:WIDTH] / rows[:WIDTH].norm(dim=1, keepdim=True)
    assert torch.allclose(block @ block.T, torch.eye(WIDTH), atol=1e-5)
    assert float((rows * rows).sum(1).mean()) == pytest.approx(WIDTH, rel=0.05)
    assert not torch.equal(orthogonal(8, WIDTH, 0), orthogonal(8, WIDTH, 1))


KEPT = [("elu", 0, WIDTH), ("positive", 0, 24), ("hedgehog", 7, 2 * WIDTH), ("efficient", 0, WIDTH)]


@pytest.mark.parametrize(("feature", "window", "width"), KEPT)
def test_what_is_kept_does_not_grow(feature: str, window: int, width: int) -> None:
    sizes = []
    for tokens in (TOKENS, 3 * TOKENS):
        kept = Kept()
        operator = policy(feature, window).operator(rotary(WIDTH), WIDTH**-0.5, 0)
        run(operator, draw(1, HEADS, GROUPS, tokens, WIDTH), [tokens - 3, 1, 1, 1], kept)
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.tensors))
    top, states = width if feature == "efficient" else 1, HEADS if feature == "hedgehog" else GROUPS
    assert sizes == 2 * [4 * (states * (width * WIDTH + width + top) + 2 * GROUPS * WIDTH * window)]


def test_long_texts_of_large_keys_stay_finite() -> None:
    query, key, value = draw(1, HEADS, GROUPS, 300, WIDTH)
    for feature in ("positive", "efficient"):
        operator = policy(feature, 0).operator(rotary(WIDTH), WIDTH**-0.5, 0)
        found = run(operator, (query * 8, key * 8, value), [100, 100, 99, 1])
        assert torch.isfinite(found).all()
        assert float(found.abs().max()) <= float(value.abs().max()) * 1.001, "weights are shares"


def test_a_query_far_from_all_keys_still_takes_shares_of_their_values() -> None:
    query, key, value = draw(2, HEADS, GROUPS, 200, WIDTH)
    operator = Linear("positive", features=24).operator(rotary(WIDTH), WIDTH**-0.5, 0)
    for scale, length in ((8, 1), (8, 4), (32, 8)):
        found = run(operator, (query * scale, key * length, value), [130, 69, 1])
        assert torch.allclose(found[:, :, 0], value[:, :, 0].repeat_interleave(HEADS // GROUPS, 1), atol=1e-4)
        ones = run(operator, (query * scale, key * length, torch.ones_like(value)), [130, 69, 1])
        assert torch.allclose(ones, torch.ones_like(ones), atol=1e-4), "weights sum to 1"


def test_features_that_are_all_shut_weigh_tokens_alike() -> None:
    shut = {name: part if "bias" in name else part * 0 for name, part in maps(False).items()}
    shut |= {name: torch.full_like(part, -1.0) for name, part in shut.items() if "bias" in name}
    states = draw(1, HEADS, GROUPS, 20, WIDTH)
    found = run(Linear("relu", maps=shut).operator(rotary(WIDTH), WIDTH**-0.5, 0), states, [20])
    means = states[2].cumsum(2) / torch.arange(1, 21)[:, None]
    assert torch.allclose(found, means.repeat_interleave(HEADS // GROUPS, 1), atol=1e-4)


def test_sines_and_cosines_are_of_independent_directions_and_favor_of_orthogonal_ones() -> None:
    drawn, blocks = (LinearOperator(Unturned(), 1.0, feature, 0, (WIDTH, 3), {}) for feature in ("fourier", "positive"))
    angles = [operator.directions(WIDTH, torch.device("cpu")) for operator in (drawn, blocks)]
    products = [(rows @ rows.T - torch.diag((rows * rows).sum(1))).abs().max() for rows in angles]
    assert float(products[0]) > 1 and float(products[1]) < 1e-3
    many = independent(4000, WIDTH, 0)
    assert torch.allclose(many.T @ many / 4000, torch.eye(WIDTH), atol=0.1)


def test_a_window_beside_features_that_are_not_learned_is_refused() -> None:
    with pytest.raises(ValueError, match="a window stands beside learned features"):
        Linear("elu", 64)


def test_the_methods_are_these_policies() -> None:
    assert LinearAttention().policy() == Linear("elu") and LinearAttention(feature="efficient").policy() == Linear("efficient")
    assert Performer(seed=1).policy(2) == Linear("positive", features=256, seed=3)
    assert Performer(feature="fourier").policy() == Linear("fourier", features=256)
    assert LearnedLinear().policy() == Linear("hedgehog", 64)


def test_each_feature_cites_the_paper_that_it_is_from() -> None:
    cited = {
        LinearAttention(): "2006.16236",
        LinearAttention(feature="efficient"): "1812.01243",
        Performer(): "2009.14794",
        Performer(feature="fourier"): None,
        LearnedLinear(): "2410.10254",
        LearnedLinear(window=0): "2402.04347",
        LearnedLinear(feature="relu", window=0): "2103.13076",
    }
    assert {method: method.citation.arxiv for method in cited} == cited
    assert Performer(feature="fourier").citation.covers == ("compact/random-fourier-features",)
