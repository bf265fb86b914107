"""α-entmax against solutions by sorting, its gradients against differences, and attention with it, written out token by token."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.methods.compact.entmax_attention import EntmaxAttention, put
from slimbench.methods.formats.attention.entmax import Entmax
from slimbench.methods.formats.attention.operators.entmax import entmax
from slimbench.methods.formats.attention.operators.interface import Kept, attentions
from tests.support import tiny
from tests.unit.methods.formats.attention.support import draw, rotary, run, turned

HEADS, GROUPS, WIDTH, TOKENS = 4, 2, 16, 40
ALPHAS = [1.0, 1.5, 2.0, 1.5]
SIZES = [[TOKENS], [1] * TOKENS, [5, 1, 1, 20, 13]]


def sparsemax(scores: Tensor) -> Tensor:
    """[z - τ]₊ of scores [n] in float64: the largest k for which 1 + k z_k > Σ_{i ≤ k} z_i gives τ (arXiv 1602.02068, algorithm 1)."""
    ranked = scores.sort(descending=True).values
    best = 0.0
    for k in range(1, len(ranked) + 1):
        if 1 + k * float(ranked[k - 1]) > float(ranked[:k].sum()):
            best = (float(ranked[:k].sum()) - 1) / k
    return (scores - best).clamp(min=0)


def entmax15(scores: Tensor) -> Tensor:
    """[z / 2 - τ]₊² by sorting: with mean M and squared deviations S of the k largest halves, τ = M - √((1 - S) / k) (1905.05702)."""
    ranked = (scores / 2).sort(descending=True).values
    for k in range(len(ranked), 0, -1):
        mean = ranked[:k].mean()
        spread = float((ranked[:k] - mean).square().sum())
        if spread <= 1 and float(threshold := mean - math.sqrt((1 - spread) / k)) <= float(ranked[k - 1]):
            return (scores / 2 - threshold).clamp(min=0).square()
    raise AssertionError("one of them fits")


EXACT = {1.0: lambda scores: scores.softmax(0), 1.5: entmax15, 2.0: sparsemax}


def rows(count: int = 40, size: int = 60) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, size, generator=generator) * torch.logspace(-3, 1.3, count)[:, None]


@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_weights_are_those_of_solutions_by_sorting(alpha: float) -> None:
    scores = rows()
    found = entmax(scores, torch.tensor([alpha]))
    wanted = torch.stack([EXACT[alpha](row) for row in scores.double()])
    assert torch.allclose(found.double(), wanted, atol=1e-5)
    assert ((found == 0) == (wanted == 0)).float().mean() > 0.999 and (found == 0).any() and (found > 0).all(1).any()


def test_near_one_it_is_the_softmax() -> None:
    scores = rows()
    apart = [float((entmax(scores, torch.tensor([alpha])) - scores.softmax(1)).abs().max()) for alpha in (1.1, 1.01, 1.001)]
    assert apart[0] > apart[1] > apart[2] and apart[2] < 2e-3
    assert torch.equal(entmax(scores, torch.tensor([1.0])), entmax(scores, torch.tensor([1.001])))


@pytest.mark.parametrize("alpha", [1.2, 1.5, 1.8, 2.0])
def test_weights_solve_the_equation_whatever_alpha(alpha: float) -> None:
    """Where p > 0 the slope of ⟨p, z⟩ plus Tsallis' entropy is the same for all, elsewhere it is no larger."""
    scores = rows()
    found = entmax(scores, torch.tensor([alpha])).double()
    assert torch.allclose(found.sum(1), torch.ones(len(found), dtype=torch.float64), atol=1e-6)
    slope = scores.double() - found ** (alpha - 1) / (alpha - 1)
    for row, weights in zip(slope, found, strict=True):
        held = row[weights > 1e-4]
        assert float(held.max() - held.min()) < 2e-3
        assert float(row[weights == 0].max()) <= float(held.max()) + 1e-3 if bool((weights == 0).any()) else True


def test_gradients_are_those_of_the_solution() -> None:
    scores = (rows(6, 12) / 3).requires_grad_(True)
    alpha = torch.tensor([[1.2], [1.5], [1.7], [1.9], [1.4], [1.3]], requires_grad=True)
    asked = torch.randn(6, 12, generator=torch.Generator().manual_seed(5))
    (entmax(scores, alpha) * asked).sum().backward()

    def value(z: Tensor, a: Tensor) -> Tensor:
        """⟨asked, p⟩ of each row in float64, by a bisection of its own."""
        less = a - 1
        x = less * z
        low, high = x.amax(1, keepdim=True) - 1, x.amax(1, keepdim=True)
        for _ in range(200):
            middle = (low + high) / 2
            above = ((x - middle).clamp(min=0) ** (1 / less)).sum(1, keepdim=True) >= 1
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return (((x - low).clamp(min=0) ** (1 / less)) * asked.double()).sum(1)

    z, a, step = scores.detach().double(), alpha.detach().double(), 1e-5
    assert alpha.grad is not None and scores.grad is not None
    by_alpha = (value(z, a + step) - value(z, a - step)) / (2 * step)
    assert torch.allclose(alpha.grad[:, 0].double(), by_alpha, atol=2e-3)
    for place in range(12):
        moved = torch.zeros_like(z)
        moved[:, place] = step
        assert torch.allclose(scores.grad[:, place].double(), (value(z + moved, a) - value(z - moved, a)) / (2 * step), atol=2e-3)


def by_sorting(query: Tensor, key: Tensor, value: Tensor, alphas: list[float]) -> Tensor:
    found = torch.zeros_like(query)
    for row in range(len(query)):
        for head in range(query.shape[1]):
            group = head // (query.shape[1] // key.shape[1])
            keys = torch.stack([turned(key[row, group, j], j) for j in range(query.shape[2])])
            for t in range(query.shape[2]):
                weights = EXACT[alphas[head]](keys[: t + 1] @ turned(query[row, head, t], t) / math.sqrt(WIDTH))
                found[row, head, t] = weights @ value[row, group, : t + 1].double()
    return found


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("alphas", [[1.5, 2.0, 1.5, 2.0], [1.0] * HEADS])
def test_heads_attend_by_their_own_alpha(alphas: list[float], sizes: list[int]) -> None:
    states, kept = draw(2, HEADS, GROUPS, TOKENS, WIDTH), Kept()
    operator = Entmax({"0.alpha": torch.tensor(alphas)}).operator(rotary(WIDTH), WIDTH**-0.5, 0)
    assert torch.allclose(run(operator, states, sizes, kept), by_sorting(*states, alphas), atol=1e-4)
    assert sum(tensor.numel() for tensor in kept.tensors) == 2 * 2 * GROUPS * TOKENS * WIDTH, "all tokens are kept"


def test_a_head_of_softmax_beside_others_is_nearly_that() -> None:
    states = draw(1, HEADS, GROUPS, TOKENS, WIDTH)
    operator = Entmax({"0.alpha": torch.tensor(ALPHAS)}).operator(rotary(WIDTH), WIDTH**-0.5, 0)
    found, wanted = run(operator, states, [TOKENS]), by_sorting(*states, ALPHAS)
    assert torch.allclose(found[:, 1:], wanted[:, 1:], atol=1e-4) and torch.allclose(found[:, :1], wanted[:, :1], atol=1e-2)


@pytest.mark.parametrize("sizes", SIZES)
def test_without_alphas_it_is_the_base(sizes: list[int]) -> None:
    states = draw(2, HEADS, GROUPS, TOKENS, WIDTH)
    made = Entmax({"0.alpha": torch.tensor(ALPHAS)}).neutral().operator(rotary(WIDTH), WIDTH**-0.5, 0)
    assert torch.allclose(run(made, states, sizes), by_sorting(*states, [1.0] * HEADS), atol=1e-5)


def test_a_long_text_in_one_piece_goes_through_in_parts() -> None:
    states = draw(1, HEADS, GROUPS, 300, WIDTH)
    operator = Entmax({"0.alpha": torch.tensor([1.2, 1.5, 1.8, 2.0])}).operator(rotary(WIDTH), WIDTH**-0.5, 0)
    assert torch.allclose(run(operator, states, [300]), run(operator, states, [100, 1, 199]), atol=1e-4)


def test_pairs_left_alone_are_those_of_heads_of_softmax() -> None:
    made = Entmax({"0.alpha": torch.tensor(ALPHAS), "1.alpha": torch.tensor([2.0] * HEADS)})
    assert made.exact_keys(15) == 120 // 8 and made.neutral().exact_keys(15) == 120


@pytest.mark.parametrize("alpha", [0.9, 2.1, math.nan])
def test_alphas_out_of_range_are_refused(alpha: Any) -> None:
    with pytest.raises(ValueError, match=r"each alpha must lie in \[1, 2\]"):
        Entmax({"0.alpha": torch.tensor([1.5, alpha])})


def test_the_heads_of_a_model_begin_at_the_start_of_the_method(tmp_path: Path) -> None:
    model: Any = tiny.save_model(tmp_path, "float32").load()
    put(model, EntmaxAttention(start=1.5).start)
    states = draw(1, HEADS, GROUPS, TOKENS, WIDTH)
    for module in attentions(model):
        assert torch.allclose(run(module.operator, states, [TOKENS]), by_sorting(*states, [1.5] * HEADS), atol=1e-4)
