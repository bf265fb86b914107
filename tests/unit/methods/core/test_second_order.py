"""Rounding with second-order information: against round-to-nearest, and against the papers' own steps in float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.methods.base import Calibration, Claim, DenseModel, Method, ModelShape, Unsupported
from slimbench.methods.core.second_order import GridRounder, Moments, Solver, drift_rows, inverse_factor, quantize, sweep
from slimbench.methods.core.walk import walk
from slimbench.methods.formats import packed
from slimbench.methods.kernels.grid import Grid, QuantizedWeight
from slimbench.methods.kernels.rounding import round_to_grid
from slimbench.methods.quantization.grids import outliers
from slimbench.methods.quantization.solvers.blockwise import measure, quantize_blocks
from slimbench.methods.quantization.weight.gptaq import GPTAQ
from slimbench.methods.quantization.weight.gptq import GPTQ
from slimbench.methods.quantization.weight.mixed_precision import MixedPrecision
from slimbench.methods.quantization.weight.owq import OWQ
from slimbench.methods.quantization.weight.quip import QuIP
from slimbench.methods.quantization.weight.spqr import SpQR, SpQRBilevel
from tests.support import tiny

CALIBRATION = tiny.tokens(samples=8, length=64)
LAYERS = 14


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"))


def correlated(inputs: int, tokens: int, seed: int) -> Tensor:
    """Inputs [tokens, in] with strong correlations and a few large features."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    x = torch.randn(tokens, inputs, generator=generator) @ mixing
    x[:, ::17] *= 5
    return x


def weight_of(outputs: int, inputs: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def moments_of(x: Tensor, other: Tensor | None = None) -> Moments:
    moments = Moments.zeros(x.shape[1], x.device, drift=other is not None)
    for part, rest in zip(x.split(100), (x if other is None else other).split(100), strict=True):
        moments.add(part, None if other is None else rest)
    return moments


def layer_error(quantized: QuantizedWeight, weight: Tensor, x: Tensor) -> float:
    return float(((quantized.dequantize().double() - weight.double()) @ x.double().t()).square().sum())


def compress(method: Method, dense: DenseModel, out: Path) -> tuple[Claim, dict[str, packed.PackedLinear]]:
    out.mkdir(exist_ok=True)
    method.check(dense.shape)
    claim = method.compress(dense, CALIBRATION, out)
    return claim, {n: m for n, m in packed.load(out).named_modules() if isinstance(m, packed.PackedLinear)}


def test_moments_do_not_depend_on_the_batches() -> None:
    x, other = correlated(16, 250, 0), correlated(16, 250, 1)
    moments = moments_of(x, other)
    assert torch.allclose(moments.hessian, 2 * x.t() @ x / 250, atol=1e-4)
    assert moments.drift is not None and torch.allclose(moments.drift, 2 * (other - x).t() @ x / 250, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group", [32, None])
def test_with_independent_inputs_it_is_rounding_to_nearest(bits: Any, symmetric: bool, act_order: bool, group: int | None) -> None:
    weight, grid = weight_of(24, 192), Grid(bits, group)
    for clip in (False, True):
        got = quantize(weight, Moments(torch.eye(192), tokens=1), grid, Solver(act_order), symmetric, clip)
        want = round_to_grid(weight, grid, symmetric, clip)
        assert torch.equal(got.codes, want.codes) and torch.equal(got.scales, want.scales)
        assert got.outliers is None and (got.offsets is None) == symmetric
        assert got.offsets is None or (want.offsets is not None and torch.equal(got.offsets, want.offsets))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_outputs_are_nearer_than_with_rounding_to_nearest(bits: Any, act_order: bool, seed: int) -> None:
    x, weight, grid = correlated(256, 2000, seed), weight_of(64, 256, seed), Grid(bits, 64)
    errors = {}
    for clip in (False, True):
        got = quantize(weight, moments_of(x), grid, Solver(act_order), clip=clip)
        errors[clip] = layer_error(got, weight, x) / layer_error(round_to_grid(weight, grid, clip=clip), weight, x)
    assert errors[False] < 1 and errors[True] < 0.8


def test_searched_ranges_round_better() -> None:
    weight = weight_of(64, 256, dtype=torch.float32)
    for symmetric in (True, False):
        plain, searched = (round_to_grid(weight, Grid(3, 64), symmetric, clip).dequantize() for clip in (False, True))
        per_group = [(w - weight).square().unflatten(1, (-1, 64)).sum(-1) for w in (plain, searched)]
        assert (per_group[1] <= per_group[0]).all() and per_group[1].sum() < 0.9 * per_group[0].sum()


def obq_in_order(weight: Tensor, hessian: Tensor, scales: Tensor, group: int, bits: int, drift: Tensor | None = None) -> Tensor:
    """Columns in order, each step with an explicit inverse of what is left of the Hessian; float64 [out, in]."""
    work, half = weight.double().clone(), 2 ** (bits - 1)
    for column in range(work.shape[1]):
        step = scales[:, column // group].double()
        rounded = (work[:, column] / step).round().clamp(-half, half - 1) * step
        left = torch.linalg.inv(hessian[column:, column:])
        change = -((work[:, column] - rounded) / left[0, 0])[:, None] * left[0, 1:]
        if drift is not None and column + 1 < len(hessian):
            change += work[:, column : column + 1] * (drift[column, column + 1 :] @ torch.linalg.inv(hessian[column + 1 :, column + 1 :]))
        work[:, column + 1 :] += change
        work[:, column] = rounded
    return work


@pytest.mark.parametrize("drifting", [False, True])
@pytest.mark.parametrize("block", [128, 32, 7])
def test_the_sweep_is_obq_in_a_fixed_order(drifting: bool, block: int) -> None:
    inputs, group, bits = 160, 32, 3
    x = correlated(inputs, 1000, 3)
    moments = moments_of(x, x + 0.3 * correlated(inputs, 1000, 4))
    weight, dampening = weight_of(20, inputs, dtype=torch.float32), 0.02
    damped = moments.hessian.double() + dampening * float(moments.hessian.diagonal().double().mean()) * torch.eye(inputs).double()
    rounder = GridRounder(weight, torch.arange(inputs), Grid(bits, group), torch.float32, clip=False)
    factor = inverse_factor(moments.hessian, dampening)
    assert torch.allclose(factor.double().t() @ factor.double() @ damped, torch.eye(inputs).double(), atol=1e-3)
    assert moments.drift is not None
    got = sweep(weight, factor, rounder, drift_rows(moments.drift, factor) if drifting else None, block)
    want = obq_in_order(weight, damped, rounder.scales.t(), group, bits, moments.drift.double() if drifting else None)
    assert torch.equal(got, rounder.result().dequantize())
    same = (got.double() - want).abs() < 1e-6
    assert same.float().mean() > 0.99, "float32 may decide a few ties in another way, and what follows from them"
    assert same.all(1).float().mean() >= 0.8


def test_drift_is_made_up_for() -> None:
    """With inputs that have drifted, the outputs come nearer to those that the uncompressed inputs give."""
    x = correlated(128, 3000, 5)
    drifted = x + 0.2 * x.roll(1, dims=1)
    weight, grid = weight_of(64, 128, 5), Grid(4, 32)
    wanted = x.double() @ weight.double().t()

    def distance(strength: float) -> float:
        quantized = quantize(weight, moments_of(drifted, x), grid, Solver(strength=strength))
        return float((drifted.double() @ quantized.dequantize().double().t() - wanted).square().sum())

    assert distance(1.0) < 0.6 * distance(0.0) and distance(0.5) < distance(0.0)


def test_columns_that_are_kept_are_exact_and_take_up_error() -> None:
    x, weight = correlated(128, 1000, 6), weight_of(32, 128, 6)
    keep = torch.zeros(128, dtype=torch.bool)
    keep[[3, 40, 100]] = True
    got = quantize(weight, moments_of(x), Grid(3, 32), Solver(), keep=keep)
    assert got.outliers is not None and got.outliers.columns.tolist() == [3, 40, 100] * 32
    assert torch.equal(got.dequantize()[:, keep], got.outliers.values.view(32, 3))
    assert not torch.equal(got.dequantize()[:, keep], weight[:, keep])
    frozen = got.dequantize().clone()
    frozen[:, keep] = weight[:, keep]
    error = ((frozen.double() - weight.double()) @ x.double().t()).square().sum()
    assert layer_error(got, weight, x) < float(error)


def test_zeros_of_pruned_weights_stay_zero() -> None:
    x, weight = correlated(128, 1000, 7), weight_of(32, 128, 7)
    weight[torch.rand(32, 128, generator=torch.Generator().manual_seed(0)) < 0.5] = 0
    got = quantize(weight, moments_of(x), Grid(4, 32), Solver())
    assert (got.dequantize()[weight == 0] == 0).all()
    assert layer_error(got, weight, x) < layer_error(round_to_grid(weight, Grid(4, 32)), weight, x)


def test_inputs_that_are_silent_or_not_finite() -> None:
    x, weight = correlated(64, 500, 8), weight_of(16, 64, 8)
    x[:, 5] = 0
    got = quantize(weight, moments_of(x), Grid(4, 32), Solver())
    assert got.dequantize().isfinite().all()
    nothing = quantize(weight, Moments.zeros(64, x.device), Grid(4, 32), Solver())
    assert torch.equal(nothing.codes, round_to_grid(weight, Grid(4, 32), clip=True).codes)
    x[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="not finite"):
        quantize(weight, moments_of(x), Grid(4, 32), Solver())


def test_layers_see_what_the_quantized_ones_before_them_compute(dense: DenseModel) -> None:
    """The moments are those of the model's own passes: of the quantized one, and of the dense one for the drift."""
    model, reference = dense.load(), dense.load()
    found: dict[str, Moments] = {}

    def quantizer(name: str, weight: Tensor, moments: Moments) -> QuantizedWeight:
        found[name] = moments
        return round_to_grid(weight, Grid(2, 32))

    names = [name for name, _ in quantize_blocks(model, CALIBRATION.ids, quantizer, drift=True)]
    assert len(names) == len(set(names)) == LAYERS
    for name in names:
        seen = [inputs_in(m, name) for m in (model, reference)]
        want = moments_of(*seen)
        assert want.drift is not None and found[name].drift is not None
        assert torch.allclose(found[name].hessian, want.hessian, rtol=0.02, atol=0.01 * float(want.hessian.abs().max()))
        assert torch.allclose(found[name].drift, want.drift, rtol=0.05, atol=0.02 * float(want.hessian.abs().max()))
    later = found["model.layers.1.mlp.down_proj"]
    assert later.drift is not None and later.drift.norm() > 0.1 * later.hessian.norm()
    first = found["model.layers.0.self_attn.q_proj"]
    assert first.drift is not None and not first.drift.any() and found["model.layers.0.self_attn.o_proj"].drift.any()  # type: ignore[union-attr]


@torch.no_grad()
def inputs_in(model: Any, name: str) -> Tensor:
    """Inputs [tokens, in] of a layer in a pass of the whole model."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    model(CALIBRATION.ids, use_cache=False)
    hook.remove()
    return torch.cat(seen)


def test_layers_that_share_inputs_stand_in_one_stage(dense: DenseModel) -> None:
    for block in walk(dense.load(), CALIBRATION.ids):
        stages = [[name.split(".")[-1] for name in stage] for stage in block.stages()]
        assert stages == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
        assert measure(block, block.stages()[0]).tokens == CALIBRATION.ids.numel()


def test_gptaq_without_strength_is_gptq(dense: DenseModel, tmp_path: Path) -> None:
    claim, layers = compress(GPTAQ(strength=0, group_size=32), dense, tmp_path)
    assert (claim.format, claim.bits, claim.group_size) == ("packed", 4, 32) and len(layers) == LAYERS
    grid, solver = Grid(4, 32), Solver()
    plain = quantize_blocks(dense.load(), CALIBRATION.ids, lambda _, weight, moments: quantize(weight, moments, grid, solver))
    for name, want in plain:
        assert torch.equal(layers[name].dequantize(), want.dequantize())


def test_gptaq_comes_nearer_to_the_dense_model(dense: DenseModel, tmp_path: Path) -> None:
    """By the logits, at 3 bits."""
    with torch.no_grad():
        wanted = dense.load()(CALIBRATION.ids).logits.float()
    errors = {}
    for strength in (0.0, 0.25, 1.0):
        out = tmp_path / str(strength)
        compress(GPTAQ(bits=3, group_size=32, strength=strength), dense, out)
        with torch.no_grad():
            errors[strength] = float((packed.load(out)(CALIBRATION.ids).logits.float() - wanted).norm())
    assert errors[0.25] < errors[0.0] and errors[1.0] < errors[0.0]


def test_owq_keeps_the_columns_that_cost_most(dense: DenseModel, tmp_path: Path) -> None:
    method = OWQ(column_fraction=0.04)
    claim, layers = compress(method, dense, tmp_path)
    name = "model.layers.0.self_attn.q_proj"
    weight, x = dense.load().get_submodule(name).weight.detach(), inputs_in(dense.load(), name)
    change = (round_to_grid(weight, Grid(3), symmetric=False, clip=True).dequantize().float() - weight.float()).square().sum(0)
    weakest = (x.float().square().mean(0) * change).topk(3).indices.sort().values
    kept = layers[name].outliers
    assert kept is not None and layers[name].groups == 1 and kept.columns.unique().tolist() == weakest.tolist()
    assert claim.bits == 3 and claim.details["outlier_fraction"] == pytest.approx(3 / 64, abs=0.01)


def test_owq_beats_the_same_grid_without_weak_columns() -> None:
    x, weight, grid = correlated(128, 1500, 9), weight_of(48, 128, 9), Grid(3)
    keep = OWQ(column_fraction=0.05).weak_columns(weight, moments_of(x))
    assert int(keep.sum()) == 7
    with_columns, plain = (quantize(weight, moments_of(x), grid, Solver(), symmetric=False, keep=mask) for mask in (keep, None))
    assert layer_error(with_columns, weight, x) < 0.8 * layer_error(plain, weight, x)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gain_of_leaving_a_weight_out_is_what_it_says(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    group, cost, grid = torch.randn(3, 32, generator=generator), torch.rand(32, generator=generator) + 0.5, Grid(3, 32)
    group[1, 7] = 9.0

    def error(weights: Tensor, price: Tensor) -> Tensor:
        low, high = weights.min(), weights.max()
        step = (2 * torch.maximum(-low, high) if symmetric else high - low) / 7
        middle = torch.zeros(()) if symmetric else low + 4 * step
        rounded = ((weights - middle) / step).round().clamp(-4, 3) * step + middle
        return ((weights - rounded).square() * price).sum()

    got = outliers.gains(group, cost, grid, torch.float32, symmetric)
    for row in range(3):
        for column in range(32):
            others = torch.arange(32) != column
            want = error(group[row], cost) - error(group[row, others], cost[others])
            assert float(got[row, column]) == pytest.approx(float(want), rel=1e-3, abs=1e-4)
    assert got.argmax() == 39 and got[1, 7] > 5 * got[0].max()


@pytest.mark.parametrize("symmetric", [True, False])
def test_spqr_keeps_the_planted_outliers(symmetric: bool) -> None:
    x, weight = correlated(128, 1500, 10), weight_of(48, 128, 10)
    rows, columns = torch.arange(0, 48, 4), torch.arange(0, 48, 4) * 2 + 11
    weight[rows, columns] = 0.6
    got = outliers.quantize(weight, moments_of(x), Grid(3, 32), 0.01, fraction=0.01, symmetric=symmetric)
    assert got.outliers is not None
    planted = set(zip(rows.tolist(), columns.tolist(), strict=True))
    found = set(zip(got.outliers.rows.tolist(), got.outliers.columns.tolist(), strict=True))
    assert len(planted & found) >= 0.9 * len(planted) and 0.004 < len(found) / weight.numel() < 0.03
    plain = quantize(weight, moments_of(x), Grid(3, 32), Solver(act_order=False), symmetric)
    assert layer_error(got, weight, x) < 0.7 * layer_error(plain, weight, x)


@pytest.mark.parametrize("method", [OWQ(), OWQ(group_size=32, symmetric=True), SpQR()], ids=lambda m: type(m).__name__)
def test_claimed_bits_are_those_in_memory(method: Method, dense: DenseModel, tmp_path: Path) -> None:
    claim, layers = compress(method, dense, tmp_path)
    stored = sum(t.nbytes for layer in layers.values() for t in layer.buffers())
    bits = 8 * stored / sum(layer.in_features * layer.out_features for layer in layers.values())
    assert claim.details["stored_bits"] == pytest.approx(bits, rel=0.02) and claim.details["stored_bits"] >= bits
    assert all(layer.outliers is not None for layer in layers.values()) and len(layers) == LAYERS


@pytest.mark.parametrize(
    "method", [GPTQ(), GPTAQ(), OWQ(), SpQR(), SpQRBilevel(), MixedPrecision(), QuIP()], ids=lambda m: type(m).__name__
)
def test_bad_calibration_is_one_line_before_work(method: Method, dense: DenseModel, tmp_path: Path) -> None:
    missing = dataclasses.replace(dense, path=tmp_path / "nowhere")
    for ids, error, message in (
        (torch.zeros(0, 32, dtype=torch.long), ValueError, "calibration holds no tokens"),
        (torch.zeros(1, 32, dtype=torch.long), Unsupported, "calibration has 32 tokens, fewer than the 64"),
        (torch.full((4, 32), 999), ValueError, "token ids outside the vocabulary of 256"),
    ):
        with pytest.raises(error, match=message) as caught:
            method.compress(missing, Calibration(ids, "bad"), tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [GPTQ, GPTAQ, OWQ, SpQR, SpQRBilevel, MixedPrecision, QuIP])
def test_settings_that_do_not_fit_are_one_line(kind: Any) -> None:
    with pytest.raises(ValueError, match="dampening must be positive, not 0") as caught:
        kind(dampening=0)
    assert "\n" not in str(caught.value)
    shape = ModelShape("LlamaForCausalLM", 96, 160, 2, 2, 2, 256, True)
    with pytest.raises(Unsupported, match="group_size 64 does not divide the input features 96"):
        kind(group_size=64).check(shape)


def test_heads_and_embeddings_keep_their_dtype(dense: DenseModel, tmp_path: Path) -> None:
    compress(OWQ(), dense, tmp_path)
    model, source = packed.load(tmp_path), dense.load()
    assert torch.equal(model.get_output_embeddings().weight, source.get_output_embeddings().weight)  # type: ignore[operator]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[operator]
