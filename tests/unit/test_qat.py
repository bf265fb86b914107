"""Methods that train a quantized model: the trained weights are those of the artefact, and training brings it nearer to the dense model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methods._training import TrainingSettings, objective
from methods.base import Claim, DenseModel, Method, Unsupported
from methods.kernels import packed
from methods.kernels.grid import Grid
from methods.quantization._grid_layers import GridLinear, ScaledLinear
from methods.quantization.peqa import PEQA, fit_grid
from tests.unit import tiny

CALIBRATION = tiny.tokens(samples=8, length=64)
SHORT: dict[str, Any] = {"steps": 30, "batch_size": 4, "length": 32}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """Weights large enough for distributions that are not flat."""
    return tiny.save_model(tmp_path_factory.mktemp("dense"), initializer_range=0.15)


def compress(method: Method, dense: DenseModel, out: Path) -> Claim:
    out.mkdir(exist_ok=True)
    method.check(dense.shape)
    return method.compress(dense, CALIBRATION if method.needs.calibration else None, out)


def divergence(folder: Path, dense: DenseModel) -> float:
    """Mean KL divergence of an artefact from the dense model, in nats, on the calibration tokens."""
    with torch.inference_mode():
        want, got = (m(CALIBRATION.ids).logits.float().log_softmax(-1) for m in (dense.load(), packed.load(folder)))
    return float((want.exp() * (want - got)).sum(-1).mean())


def assert_training_helps(method: TrainingSettings, dense: DenseModel, folder: Path, factor: float) -> Claim:
    """Against the same method with a learning rate of next to nothing."""
    claim = compress(method, dense, folder / "trained")  # type: ignore[arg-type]
    compress(dataclasses.replace(method, learning_rate=1e-12), dense, folder / "still")  # type: ignore[arg-type]
    assert divergence(folder / "trained", dense) < factor * divergence(folder / "still", dense)
    facts = claim.details["training"]
    assert facts["loss_after"] < facts["loss_before"] and len(facts["loss_curve"]) == method.steps
    assert claim.training_tokens == method.steps * method.batch_size * method.length
    return claim


def tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def assert_trains_what_it_stores(layer: GridLinear) -> None:
    """Outside of training and in it, the weights are those that the artefact gives back, bit for bit."""
    effective = layer.effective()
    assert effective.requires_grad and torch.equal(effective.detach(), layer.quantized().dequantize().float())


def scaled(weight: Tensor, grid: Grid, symmetric: bool, dtype: torch.dtype) -> ScaledLinear:
    source = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    source.weight = nn.Parameter(weight)
    layer = ScaledLinear(source, grid, dtype, *fit_grid(weight, grid, symmetric, dtype))
    layer.scales.requires_grad_(True)
    return layer


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scaled_layer_trains_what_it_stores(bits: Any, symmetric: bool, dtype: torch.dtype) -> None:
    layer = scaled(torch.randn(8, 64), Grid(bits, 32), symmetric, dtype)
    assert_trains_what_it_stores(layer)
    with torch.no_grad():
        layer.scales.mul_(1.01)
    assert_trains_what_it_stores(layer)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradient_of_a_scale_is_that_of_the_definition(symmetric: bool) -> None:
    """w = s (q − z), so dL/ds = Σ dL/dw (q − z) over the group."""
    layer = scaled(torch.randn(8, 64) + 0.3, Grid(3, 32), symmetric, torch.float32)
    pull = torch.randn(8, 64)
    (layer.effective() * pull).sum().backward()
    integers = layer.codes.float().unflatten(1, (2, 32)) - (4 if layer.zeros is None else layer.zeros.unsqueeze(-1))
    want = (pull.unflatten(1, (2, 32)) * integers).sum(-1)
    assert layer.scales.grad is not None and torch.allclose(layer.scales.grad, want, atol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_fitted_grid_is_the_best_of_its_ranges(symmetric: bool) -> None:
    weight = torch.randn(16, 64).pow(3)
    for bits in (2, 3, 4):
        grid = Grid(bits, 32)  # type: ignore[arg-type]
        codes, scales, zeros = fit_grid(weight, grid, symmetric, torch.float32)
        middle = grid.mid if zeros is None else zeros.unsqueeze(-1)
        fitted = ((codes.float().unflatten(1, (2, 32)) - middle) * scales.unsqueeze(-1)).flatten(1)
        groups = weight.unflatten(1, (2, 32))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        if symmetric:
            high, low = torch.maximum(high, -low), -torch.maximum(high, -low)
        step = (high - low) / (2**bits - 1)
        zero = grid.mid if symmetric else (-low / step).round()
        whole = (((groups / step).round() + zero).clamp(0, 2**bits - 1) - zero) * step
        better = ((fitted - weight) ** 2).unflatten(1, (2, 32)).sum(-1) <= ((whole - groups) ** 2).sum(-1) + 1e-6
        assert better.all()
        assert ((fitted - weight) ** 2).sum() < 0.98 * ((whole - groups) ** 2).sum()


def test_a_group_of_zeros_stays_zero() -> None:
    weight = torch.randn(4, 64)
    weight[:, :32] = 0
    for symmetric in (True, False):
        layer = scaled(weight, Grid(3, 32), symmetric, torch.bfloat16)
        assert (layer.effective()[:, :32] == 0).all()


def test_peqa_trains_the_scales_and_nothing_else(dense: DenseModel, tmp_path: Path) -> None:
    claim = assert_training_helps(PEQA(bits=3, group_size=32, learning_rate=1e-3, **SHORT), dense, tmp_path, 0.9)
    trained, still = tensors(tmp_path / "trained"), tensors(tmp_path / "still")
    assert set(trained) == set(still)
    changed = {name.rpartition(".")[2] for name in trained if not torch.equal(trained[name], still[name])}
    assert changed == {"scales", "offsets"}
    assert claim.trained_parameters == sum(t.numel() for name, t in trained.items() if name.endswith(".scales"))
    assert (claim.bits, claim.group_size, claim.format) == (3, 32, "packed")


@pytest.mark.parametrize("make", [lambda: PEQA(group_size=32, **SHORT)])
def test_a_killed_method_resumes_to_the_same_artefact(make: Callable[[], Method], dense: DenseModel, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(done: float, total: float) -> None:
        if (done, total) == (25, 30):
            raise Killed

    compress(make(), dense, tmp_path / "whole")
    interrupted = dataclasses.replace(dense, checkpoints=tmp_path / "kept", progress=kill)
    with pytest.raises(Killed):
        compress(make(), interrupted, tmp_path / "killed")
    seen: list[float] = []
    compress(make(), dataclasses.replace(interrupted, progress=lambda done, _: seen.append(done)), tmp_path / "resumed")
    assert seen == [21, 22, 23, 24, 25, 26, 27, 28, 29, 30]
    assert (tmp_path / "resumed/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_training_on_the_text_itself(dense: DenseModel, tmp_path: Path) -> None:
    settings = PEQA(group_size=32, learning_rate=1e-3, loss="nll", **SHORT)
    claim = compress(settings, dense, tmp_path)
    assert claim.details["training"]["loss_after"] < claim.details["training"]["loss_before"]
    nll = objective(settings, packed.load(tmp_path), dense)
    with torch.no_grad():
        assert float(nll(CALIBRATION.ids)) < float(objective(settings, dense.load(), dense)(CALIBRATION.ids))


def test_groups_that_do_not_fit_are_refused(dense: DenseModel) -> None:
    for method in (PEQA(group_size=128),):
        with pytest.raises(Unsupported, match="group_size 128"):
            method.check(dense.shape)
