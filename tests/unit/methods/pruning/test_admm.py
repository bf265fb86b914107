"""ADMM pruning against exact masked least squares and against its own steps with NumPy, and inside a model."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slimbench.methods.base import DenseModel, Unsupported
from slimbench.methods.pruning.unstructured.admm import ADMM, alternate, reconstruct
from tests.support import tiny
from tests.support.architectures import make

CALIBRATION = tiny.tokens(samples=6, length=48)
PATTERNS = [None, "2:4", "4:8"]


def layer(seed: int, outputs: int = 16, inputs: int = 24) -> tuple[Tensor, Tensor]:
    """A weight, and correlated inputs [tokens, in] of different strengths."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(inputs) + 0.4 * torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(300, inputs, generator=generator) @ mixing * torch.logspace(-1, 1, inputs)[torch.randperm(inputs, generator=generator)]
    return torch.randn(outputs, inputs, generator=generator), x


def normed(weight: Tensor, x: Tensor, dampening: float = 0.1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weight and second moments with inputs of the same strength, and the strengths; float64."""
    h = x.double().numpy().T @ x.double().numpy()
    n = np.sqrt(np.diag(h))
    h = h / np.outer(n, n)
    return weight.double().numpy() * n, h + dampening * np.diag(h).mean() * np.eye(len(n)), n


def cost(weight: np.ndarray, dense: np.ndarray, h: np.ndarray) -> float:
    return float(np.einsum("ri,ij,rj->", weight - dense, h, weight - dense))


def least_squares(dense: np.ndarray, h: np.ndarray, gone: np.ndarray) -> np.ndarray:
    """The weights under a mask that cost least, row by row with Cholesky."""
    best = np.zeros_like(dense)
    for row, (w, mask) in enumerate(zip(dense, gone, strict=True)):
        kept = ~mask
        lower = np.linalg.cholesky(h[np.ix_(kept, kept)])
        best[row, kept] = np.linalg.solve(lower.T, np.linalg.solve(lower, h[kept] @ w))
    return best


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_a_given_mask_gets_its_least_squares(seed: int, sparsity: float) -> None:
    weight, x = layer(seed)
    dense, h, n = normed(weight, x)
    gone = np.random.default_rng(seed).random(weight.shape) < sparsity
    best = cost(least_squares(dense, h, gone), dense, h)
    for steps, excess in ((20, 1e-2), (200, 1e-4)):
        got = reconstruct(weight, x.T @ x, torch.from_numpy(gone), steps)
        assert not bool(got[torch.from_numpy(gone)].any())
        found = cost(got.double().numpy() * n, dense, h)
        assert best * (1 - 1e-5) <= found <= best * (1 + excess)
        assert found < 0.9 * cost(dense * ~gone, dense, h), "against the mask without an update"
    np.testing.assert_allclose(got.numpy() * n, least_squares(dense, h, gone), atol=2e-2 * np.abs(dense).max())


def test_the_unit_of_the_second_moments_is_of_no_matter() -> None:
    weight, x = layer(4)
    gone = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    torch.testing.assert_close(reconstruct(weight, x.T @ x, gone), reconstruct(weight, x.T @ x / 300, gone), rtol=1e-4, atol=1e-5)


def step_by_step(
    weight: Tensor, x: Tensor, sparsity: float, pattern: str | None, steps: int, growth: int, penalty: float, dampening: float
) -> tuple[np.ndarray, list[int]]:
    """The paper's steps, and the zeros of each."""
    dense, h, n = normed(weight, x, dampening)
    w, u, counts = dense.copy(), np.zeros_like(dense), []
    inverse = np.linalg.inv(h + penalty * np.eye(len(h)))
    for t in range(1, steps + 1):
        if t <= growth:
            scores = np.abs(w + u)
            if pattern:
                prune, m = map(int, pattern.split(":"))
                order = np.argsort(np.argsort(scores.reshape(-1, m), axis=1), axis=1).reshape(scores.shape)
                scores = np.where(order < prune, scores, np.inf)
            count = round(round(sparsity * dense.size) * (1 - (1 - t / growth) ** 3))
            mask = np.isin(np.arange(dense.size), np.argsort(scores.ravel(), kind="stable")[:count]).reshape(dense.shape)
        counts.append(int(mask.sum()))
        z = (w + u) * ~mask
        u = u + w - z
        w = (dense @ h + penalty * (z - u)) @ inverse
    return (w + u) * ~mask / n, counts


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("settings", [{}, {"steps": 9, "growth": 4}, {"penalty": 0.3, "dampening": 0.02}, {"steps": 6, "growth": 6}])
def test_steps_and_masks_are_those_of_the_paper(settings: dict[str, Any], pattern: str | None) -> None:
    weight, x = layer(6, 20, 32)
    method = ADMM(sparsity=0.5 if pattern else 0.6, pattern=pattern, **settings)
    seen: list[int] = []
    masks = method.masks()

    def watched(step: int, moved: Tensor) -> Tensor:
        seen.append(int((mask := masks(step, moved)).sum()))
        return mask

    got = alternate(weight, x.T @ x / 300, watched, method.steps, method.penalty, method.dampening)
    want, counts = step_by_step(weight, x, method.sparsity, pattern, method.steps, method.growth, method.penalty, method.dampening)
    assert seen == counts and seen[method.growth - 1 :] == [round(method.sparsity * 640)] * (method.steps - method.growth + 1)
    assert np.array_equal(got.numpy() == 0, want == 0)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("step", range(15))
def test_the_mask_grows_by_a_cubic_whatever_is_tied(step: int, pattern: str | None) -> None:
    scores = torch.randint(0, 3, (24, 32), generator=torch.Generator().manual_seed(step)).float()
    method = ADMM(sparsity=0.5, pattern=pattern)
    mask = method.mask(scores, step)
    assert int(mask.sum()) == round(384 * (1 - (1 - (step + 1) / 15) ** 3))
    assert step or int(mask.sum()) == 72, "a fifth of the way at the first step"
    if pattern:
        n, m = map(int, pattern.split(":"))
        per_run = mask.unflatten(1, (-1, m)).sum(-1)
        assert int(per_run.max()) <= n and (step < 14 or bool((per_run == n).all()))


def test_what_was_pruned_early_may_come_back() -> None:
    weight, x = layer(9, 64, 64)
    masks: list[Tensor] = []
    grow = ADMM(sparsity=0.7).masks()

    def watched(step: int, moved: Tensor) -> Tensor:
        masks.append(grow(step, moved))
        return masks[-1]

    alternate(weight, x.T @ x, watched, 20, 1.0, 0.1)
    assert any(bool((before & ~after).any()) for before, after in pairwise(masks))
    assert all(torch.equal(mask, masks[14]) for mask in masks[14:])


def test_inputs_that_are_silent_go_first_and_spoil_nothing() -> None:
    weight, x = layer(11)
    x[:, [3, 8]] = 0
    method = ADMM()
    got = alternate(weight, x.T @ x, method.masks(), 20, 1.0, 0.1)
    assert bool(got.isfinite().all()) and int((got == 0).sum()) == got.numel() // 2 and not bool(got[:, [3, 8]].any())
    assert bool(alternate(weight, torch.zeros(24, 24), method.masks(), 20, 1.0, 0.1).isfinite().all())


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"), "float32")


@pytest.mark.parametrize(("sparsity", "pattern"), [(0.6, None), (0.5, "2:4")])
def test_layers_of_a_model_are_nearer_than_with_the_mask_alone(
    dense: DenseModel, tmp_path: Path, sparsity: float, pattern: str | None
) -> None:
    """On inputs from the pruned blocks before them; all zeros are exact, and the pattern lies along the inputs."""
    claim = ADMM(sparsity=sparsity, pattern=pattern).compress(dense, CALIBRATION, tmp_path)
    got, whole = tiny.dense_model(tmp_path, "float32").load(), dense.load()
    weights = {name: layer.weight.detach().clone() for name, layer in tiny.block_layers(got).items()}
    for index in (1, 0):
        got.model.layers[index].load_state_dict(whole.model.layers[index].state_dict())
        for name, layer in tiny.block_layers(got).items():
            if f"layers.{index}." not in name:
                continue
            gone, original = weights[name] == 0, layer.weight.detach().double()
            assert int(gone.sum()) == round(sparsity * gone.numel())
            assert pattern is None or bool((gone.unflatten(1, (-1, 4)).sum(-1) == 2).all())
            x = tiny.layer_inputs(got, name, CALIBRATION.ids)
            errors = [((w.double() - original) @ x.T).norm() for w in (weights[name], original.masked_fill(gone, 0))]
            assert errors[0] < 0.97 * errors[1]
            if index == 0:
                want = alternate(original.float(), (x.T @ x).float(), ADMM(sparsity=sparsity, pattern=pattern).masks(), 20, 1.0, 0.1)
                assert float(((want == 0) == gone).float().mean()) > 0.999
                assert (want - weights[name]).norm() < 0.02 * want.norm()
    count, size = (sum(values) for values in zip(*((int((w == 0).sum()), w.numel()) for w in weights.values()), strict=True))
    assert claim.sparsity == count / size and claim.pattern == pattern


def test_opt_is_pruned_keeps_its_biases_and_comes_out_the_same_twice(tmp_path: Path) -> None:
    model = make("opt")
    source, states = tiny.saved(model, tmp_path / "source"), []
    for name in ("one", "two"):
        (out := tmp_path / name).mkdir()
        assert ADMM().compress(source, CALIBRATION, out).sparsity == 0.5
        states.append(tiny.dense_model(out, "float32").load().state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    pruned, before = states[0], model.state_dict()
    for name in tiny.block_layers(model):
        assert torch.equal(pruned[f"{name}.bias"], before[f"{name}.bias"])
        assert not torch.equal(pruned[f"{name}.weight"], before[f"{name}.weight"].masked_fill(pruned[f"{name}.weight"] == 0, 0))


def test_stacked_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="holds 4 experts in one tensor; only linear layers can be handled") as caught:
        ADMM().compress(tiny.saved(make("mixtral"), tmp_path / "source"), CALIBRATION, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"growth": 21}, "growth must be between 1 and the 20 steps, not 21"),
        ({"penalty": 0.0}, "penalty must be positive"),
        ({"dampening": 0.0}, "dampening must be positive"),
        ({"sparsity": 0.6, "pattern": "2:4"}, "pattern 2:4 means sparsity 0.5"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ADMM(**settings)


def test_runs_that_do_not_tile_the_inputs_are_refused(dense: DenseModel) -> None:
    with pytest.raises(Unsupported, match="pattern 3:6 does not divide the input features 64"):
        ADMM(pattern="3:6").check(dense.shape)
