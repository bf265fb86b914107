"""QuIP: the rotation leaves what a layer computes, the grid is the best for a normal distribution, and rounding gains by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimbench.methods.base import DenseModel
from slimbench.methods.core.second_order import Moments, Solver
from slimbench.methods.core.second_order import quantize as plain
from slimbench.methods.formats import runtime
from slimbench.methods.formats.runtime import PlannedLinear, transform
from slimbench.methods.kernels.grid import Grid
from slimbench.methods.kernels.packed_linear import PackedLinear
from slimbench.methods.quantization.solvers import incoherence
from slimbench.methods.quantization.weight.quip import QuIP
from tests.support import tiny
from tests.unit.methods.core.test_second_order import CALIBRATION, correlated, moments_of, weight_of


@pytest.mark.parametrize("rescale", [True, False])
def test_the_rotation_leaves_what_a_layer_computes(rescale: bool) -> None:
    x, weight = correlated(192, 1000, 0), weight_of(32, 192)
    x[:, 3] = 0
    weight[:, 9] = 0
    moments = moments_of(x)
    plan = incoherence.plan_for(weight, moments, rescale, torch.Generator().manual_seed(0))
    plan.check(192)
    turned, rotated = transform(x, plan), incoherence.rotate_weight(weight, plan)
    assert plan.hadamard == 64 and plan.signs is not None and set(plan.signs.tolist()) == {-1, 1}
    assert torch.allclose(turned @ rotated.t(), x @ weight.float().t(), atol=1e-3)
    assert torch.allclose(incoherence.rotate_back(rotated, plan), weight.float(), atol=1e-5)
    hessian = incoherence.rotate_hessian(moments.hessian, plan)
    assert torch.allclose(hessian, moments_of(turned).hessian, atol=1e-3 * float(hessian.max()))


def test_scales_make_the_bound_least() -> None:
    x, weight = correlated(128, 1000, 1), weight_of(32, 128, 1, torch.float32)
    moments = moments_of(x)

    def bound(scale: torch.Tensor) -> float:
        return float((moments.hessian.diagonal() / scale**2).sum() * (weight * scale).square().sum())

    scale = incoherence.plan_for(weight, moments, True, torch.Generator()).scale
    assert scale is not None and bound(scale) < 0.9 * bound(torch.ones(128))
    for seed in range(5):
        other = scale * (1 + 0.1 * torch.randn(128, generator=torch.Generator().manual_seed(seed)))
        assert bound(scale) < bound(other)


@pytest.mark.parametrize(("bits", "step"), [(1, 1.596), (2, 0.9957), (3, 0.5860), (4, 0.3352)])
def test_steps_are_those_of_the_best_uniform_quantizer_of_a_normal_variable(bits: int, step: float) -> None:
    """Values as tabulated since Max (1960); the error against a sample."""
    got = incoherence.gaussian_step(bits)
    assert got == pytest.approx(step, abs=1e-3)
    z, half = torch.randn(400_000, generator=torch.Generator().manual_seed(0)), 2 ** (bits - 1)
    rounded = ((z / got - 0.5).round().clamp(-half, half - 1) + 0.5) * got
    assert float((z - rounded).square().mean()) == pytest.approx(incoherence.gaussian_error(got, bits), rel=0.02)


def test_weights_with_outliers_round_better_after_the_rotation() -> None:
    x, weight = correlated(256, 2000, 2), weight_of(64, 256, 2)
    weight[torch.arange(64), (torch.arange(64) * 7) % 256] *= 12
    moments, grid = moments_of(x), Grid(2)
    plan = incoherence.plan_for(weight, moments, True, torch.Generator().manual_seed(0))
    got = incoherence.quantize(weight, moments, plan, grid, 0.01)
    rotated = incoherence.rotate_weight(weight, plan)
    peaks = [float((w.abs().amax(1) / w.square().mean(1).sqrt()).mean()) for w in (weight.float(), rotated)]
    assert peaks[1] < 0.7 * peaks[0]

    def error(made: torch.Tensor) -> float:
        return float(((made.double() - weight.double()) @ x.double().t()).square().sum())

    best = min(error(plain(weight, moments, grid, Solver(), symmetric).dequantize()) for symmetric in (True, False))
    assert error(incoherence.rotate_back(got.dequantize(), plan)) < 0.8 * best


def test_independent_normal_weights_have_the_error_of_theory() -> None:
    weight = weight_of(64, 512, 3, torch.float32)
    plan = incoherence.plan_for(weight, Moments(torch.eye(512), tokens=1), False, torch.Generator())
    got = incoherence.quantize(weight, Moments(torch.eye(512), tokens=1), plan, Grid(2), 0.01).dequantize()
    error = (got - incoherence.rotate_weight(weight, plan)).square().mean() / weight.square().mean()
    assert float(error) == pytest.approx(incoherence.gaussian_error(incoherence.gaussian_step(2), 2), rel=0.05)


def test_the_artefact_computes_what_the_rounded_model_does(tmp_path: Path) -> None:
    dense: DenseModel = tiny.save_model(tmp_path / "dense", dtype="float32")
    out = tmp_path / "quip"
    out.mkdir()
    method = QuIP(bits=4)
    claim = method.compress(dense, CALIBRATION, out)
    model = runtime.load(out)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PlannedLinear)}
    assert len(layers) == 14 and all(isinstance(layer.inner, PackedLinear) for layer in layers.values())
    assert (claim.format, claim.bits, claim.group_size, claim.simulated) == ("runtime", 4, None, False)
    assert claim.details["hadamard_blocks"] == [64, 128]
    rounded = dense.load()
    for name, layer in layers.items():
        inner, inputs = layer.inner, layer.inputs
        assert isinstance(inner, PackedLinear)
        plan = runtime.InputPlan(scale=inputs.scale, signs=inputs.signs, hadamard=inputs.hadamard)
        rounded.get_submodule(name).weight.data.copy_(incoherence.rotate_back(inner.dequantize(), plan))  # type: ignore[union-attr]
    with torch.no_grad():
        got, want, exact = (m(CALIBRATION.ids).logits for m in (model, rounded, dense.load()))
    assert torch.allclose(got, want, atol=1e-3) and 0 < (got - exact).norm() < 0.2 * exact.norm()
