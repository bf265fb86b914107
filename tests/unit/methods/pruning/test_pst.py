"""PST: the gradients of its factors weight by weight, its choice of masks by a sort, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from slimbench.methods.pruning.training.pst import PST, Factored
from slimbench.methods.pruning.training.scored import masked
from tests.support import tiny

TOKENS = tiny.tokens(8, 32)
METHOD = PST(
    steps=10, begin=0.2, end=0.8, sparsity=0.6, weight_rank=2, score_rank=3, weight_scale=0.5, low_rank_scale=0.7, structured_scale=1.3
)


def importance(weight: Tensor, held: dict[str, Tensor]) -> tuple[list[list[float]], list[list[float]]]:
    """W and S, element by element."""
    rows, columns = weight.shape
    whole = [
        [float(weight[i, j]) + 0.5 * sum(float(held["U"][i, k] * held["V"][k, j]) for k in range(2)) for j in range(columns)]
        for i in range(rows)
    ]
    scores = [
        [
            abs(whole[i][j])
            + 0.7 * sum(float(held["A"][i, k] * held["B"][k, j]) for k in range(3))
            + 1.3 * (float(held["R"][i]) + float(held["C"][j]))
            for j in range(columns)
        ]
        for i in range(rows)
    ]
    return whole, scores


@pytest.fixture
def toy() -> tuple[dict[str, nn.Linear], Factored]:
    torch.manual_seed(0)
    layers = {"it": nn.Linear(5, 4)}
    masks = METHOD.masks(None, layers, 0)
    for values in masks.factors["it"].values():
        values.data.copy_(torch.randn_like(values) / 3)
    return layers, masks


@pytest.mark.parametrize("done", [2, 5, 10])
def test_the_lowest_scores_go(toy: Any, done: int) -> None:
    layers, masks = toy
    masks.after_step(done - 1, None)
    _, scores = importance(layers["it"].weight.detach(), {k: v.detach() for k, v in masks.factors["it"].items()})
    count = round((0.6 - 0.6 * (1 - (min(done, 8) - 2) / 6) ** 3) * 20)
    order = sorted((scores[i][j], i, j) for i in range(4) for j in range(5))
    wanted = torch.zeros(4, 5, dtype=torch.bool)
    for _, i, j in order[:count]:
        wanted[i, j] = True
    assert torch.equal(masks.gone("it"), wanted)


def test_gradients_reach_all_factors(toy: Any) -> None:
    """With P = ∂L/∂(W ⊙ M): ∂L/∂S = P ⊙ W, ∂L/∂W = P ⊙ M + P ⊙ W ⊙ sign W, and then the rules of products and sums."""
    layers, masks = toy
    masks.after_step(9, None)
    inputs, pull = torch.randn(6, 5), torch.randn(6, 4)
    with masked(layers, masks):
        made = layers["it"](inputs)
    (made * pull).sum().backward()
    made = made.detach()
    held = {letter: value.detach() for letter, value in masks.factors["it"].items()}
    whole, _ = importance(layers["it"].weight.detach(), held)
    gone = masks.gone("it")
    outer = [[sum(float(pull[t, i] * inputs[t, j]) for t in range(6)) for j in range(5)] for i in range(4)]
    scored = [[outer[i][j] * whole[i][j] for j in range(5)] for i in range(4)]
    moved = [
        [outer[i][j] * (0.0 if gone[i, j] else 1.0) + scored[i][j] * (1 if whole[i][j] > 0 else -1) for j in range(5)] for i in range(4)
    ]
    wanted = {
        "U": [[0.5 * sum(moved[i][j] * float(held["V"][k, j]) for j in range(5)) for k in range(2)] for i in range(4)],
        "V": [[0.5 * sum(moved[i][j] * float(held["U"][i, k]) for i in range(4)) for j in range(5)] for k in range(2)],
        "A": [[0.7 * sum(scored[i][j] * float(held["B"][k, j]) for j in range(5)) for k in range(3)] for i in range(4)],
        "B": [[0.7 * sum(scored[i][j] * float(held["A"][i, k]) for i in range(4)) for j in range(5)] for k in range(3)],
        "R": [1.3 * sum(scored[i]) for i in range(4)],
        "C": [1.3 * sum(scored[i][j] for i in range(4)) for j in range(5)],
    }
    for letter, values in wanted.items():
        torch.testing.assert_close(masks.factors["it"][letter].grad, torch.tensor(values), rtol=1e-4, atol=1e-5)
    for token in range(6):
        for i in range(4):
            terms = sum(float(inputs[token, j]) * whole[i][j] for j in range(5) if not gone[i, j])
            assert float(made[token, i]) == pytest.approx(terms + float(layers["it"].bias.detach()[i]), abs=1e-4)
    masks.finish()
    torch.testing.assert_close(layers["it"].weight.detach(), torch.tensor(whole).masked_fill(gone, 0.0), rtol=1e-4, atol=1e-6)
    assert torch.equal(layers["it"].weight == 0, gone)


def test_the_beginning_is_the_dense_model() -> None:
    """U and A are normal, the rest is 0, so that W = W₀ and S = |W₀|; another seed draws other numbers."""
    layers = {"it": nn.Linear(40, 50)}
    held, other = ({k: v.detach() for k, v in METHOD.masks(None, layers, seed).factors["it"].items()} for seed in (0, 1))
    masks = METHOD.masks(None, layers, 0)
    assert torch.equal(masks.score("it"), layers["it"].weight.abs())
    torch.testing.assert_close(masks.weight("it"), layers["it"].weight, rtol=1e-5, atol=1e-6, check_stride=False)
    assert all(not held[letter].any() for letter in "VBRC")
    assert all(0.8 < float(held[letter].std()) < 1.2 and not torch.equal(held[letter], other[letter]) for letter in "UA")
    assert not masks.gone("it").any()


def test_only_the_factors_learn(tmp_path: Path) -> None:
    dense = tiny.save_model(tmp_path / "source", "float32")
    (tmp_path / "out").mkdir()
    claim = PST(steps=12, batch_size=2, length=16, learning_rate=1e-2, weight_rank=4, score_rank=6).compress(
        dense, TOKENS, tmp_path / "out"
    )
    was, made = load_file(tmp_path / "source" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    sizes = 0
    for name, value in made.items():
        if "_proj" not in name:
            assert torch.equal(value, was[name])
            continue
        rows, columns = value.shape
        sizes += (4 + 6) * (rows + columns) + rows + columns
        assert int((value == 0).sum()) == value.numel() // 2
        change = (value - was[name]).masked_fill(value == 0, 0.0)
        assert change.abs().max() > 1e-3
    assert claim.trained_parameters == sizes and claim.sparsity == 0.5 and claim.training_tokens == 12 * 2 * 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_rank": 0}, "weight_rank must be at least 1"),
        ({"score_rank": 0}, "score_rank must be at least 1"),
        ({"structured_scale": 0.0}, "structured_scale must be positive"),
        ({"sparsity": 1.0}, "sparsity must be between 0 and 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PST(**settings)
