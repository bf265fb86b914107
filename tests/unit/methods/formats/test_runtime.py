"""The runtime format: what layers do to their inputs, its rounding against definitions in float64, and the way through the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from slimbench.methods.base import DenseModel
from slimbench.methods.core.layers import block_linears
from slimbench.methods.formats import packed, runtime
from slimbench.methods.formats.runtime import ActivationGrid, InputPlan, fake_quantize, hadamard, transform
from slimbench.methods.kernels.numbers import FLOATS, largest_power_of_two, minifloat, outlier_victim
from slimbench.methods.kernels.rounding import round_layers
from tests.support import tiny

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"))


def inputs(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, a few of them large."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x[..., ::13] *= 20
    return x


def sylvester(size: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / size**0.5


@pytest.mark.parametrize("block", [1, 2, 16, 64])
def test_hadamard_is_sylvesters_orthonormal_matrix_in_blocks(block: int) -> None:
    x = inputs(3, 5, 192).double()
    matrix = torch.block_diag(*[sylvester(block)] * (192 // block))
    torch.testing.assert_close(hadamard(x, block), x @ matrix)
    torch.testing.assert_close(hadamard(hadamard(x, block), block), x)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(192, dtype=torch.float64))


def test_hadamard_refuses_blocks_that_do_not_fit() -> None:
    for block in (0, 3, 128):
        with pytest.raises(ValueError, match="no power of two that divides 192"):
            hadamard(torch.zeros(192), block)
    assert [largest_power_of_two(n) for n in (576, 1536, 64)] == [64, 512, 64]


@pytest.mark.parametrize("format", ["e4m3", "e2m1"])
def test_minifloat_is_the_nearest_number_of_the_format(format: Literal["e4m3", "e2m1"]) -> None:
    points = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double() if format == "e4m3" else E2M1.double()
    assert points.max() == FLOATS[format].largest
    x = torch.cat((inputs(4000) * points.max() / 20, points.float(), (points[1:] + points[:-1]).float() / 2))
    x = torch.cat((x, -x, x * 1e-3))
    got = minifloat(x, format).double()
    distances = (x.double().abs().clamp_max(points.max()).unsqueeze(1) - points).abs()
    assert torch.equal((got.abs() - x.double().abs().clamp_max(points.max())).abs(), distances.amin(1))
    assert torch.isin(got.abs(), points).all() and (got * x >= 0).all()
    if format == "e4m3":
        assert torch.equal(got, x.clamp(-448, 448).to(torch.float8_e4m3fn).double())
    assert minifloat(torch.tensor([float("nan")]), format).isnan().all()


def test_outliers_take_over_the_code_of_their_victim() -> None:
    pairs = [(3.2, -6.7), (7.4, 7.4), (8, 6.9), (1, -20.1), (-90, 95), (500, 0), (13.9, -14.1), (0, 0), (7.6, -7.6)]
    want = [(3, -7), (7, 7), (12, 0), (0, -24), (0, 96), (96, 0), (0, -16), (0, 0), (12, 0)]
    got = outlier_victim(torch.tensor(pairs).float().flatten()).view(-1, 2)
    assert got.tolist() == [[float(x) for x in pair] for pair in want]
    grid = ActivationGrid("ovp", 4, "tensor")
    x = inputs(5, 64)
    assert torch.equal(fake_quantize(x, grid, torch.tensor(0.3)), outlier_victim(x / 0.3) * 0.3)


def nearest(x: Tensor, scale: Tensor, points: Tensor) -> Tensor:
    """The nearest of `points` times `scale`, in float64; x and scale broadcast."""
    candidates = torch.cat((-points.flip(0), points)).double()
    index = ((x.double() / scale.double()).unsqueeze(-1) - candidates).abs().argmin(-1)
    return candidates[index] * scale.double()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("granularity", ["token", "tensor", "group"])
def test_symmetric_integers_equal_their_definition(bits: int, granularity: Any) -> None:
    x = inputs(3, 7, 64)
    grid = ActivationGrid("int", bits, granularity, 32 if granularity == "group" else None)
    shaped = x.unflatten(-1, (-1, 32)) if granularity == "group" else x
    largest = shaped.abs().amax() if granularity == "tensor" else shaped.abs().amax(-1, keepdim=True)
    want = nearest(shaped, largest / (2 ** (bits - 1) - 1), torch.arange(2.0 ** (bits - 1)))
    torch.testing.assert_close(fake_quantize(x, grid).double(), want.view_as(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(fake_quantize(torch.zeros_like(x), grid), torch.zeros_like(x))


def test_asymmetric_integers_run_over_the_range_and_hold_zero() -> None:
    x = inputs(9, 64).abs() + torch.linspace(-5, 5, 9).unsqueeze(1)
    x[:, 5] = 0
    got = fake_quantize(x, ActivationGrid("int", 4, symmetric=False)).double()
    step = (x.amax(1).clamp_min(0) - x.amin(1).clamp_max(0)).double() / 15
    assert (got[:, 5] == 0).all()
    assert ((got - x).abs() <= step.unsqueeze(1) * 1.001).all() and ((got - x).abs() / step.unsqueeze(1)).mean() < 0.35
    assert all(len(row.unique()) <= 16 for row in got.float())
    finer = fake_quantize(x, ActivationGrid("int", 4))
    assert (got - x).square().mean() < (finer.double() - x).square().mean()


def test_mx_blocks_equal_the_definition_of_the_standard() -> None:
    x = inputs(5, 64)
    x[0, :32] = 0
    got = fake_quantize(x, ActivationGrid("e2m1", 4, "group", 32, scale_format="e8m0"))
    blocks = x.double().unflatten(-1, (-1, 32))
    scale = torch.exp2(torch.floor(torch.log2(blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30))) - 2)
    want = nearest(blocks.clamp(-6 * scale, 6 * scale), scale, E2M1)
    assert torch.equal(got.double(), want.view_as(x))


@pytest.mark.parametrize("static", [True, False])
def test_nv_blocks_have_e4m3_scales_under_one_of_the_tensor(static: bool) -> None:
    x = inputs(5, 64)
    grid = ActivationGrid("e2m1", 4, "group", 16, scale_format="e4m3")
    shared = x.abs().amax() / (6 * 448) if static else x.abs().amax(-1).view(-1, 1, 1) / (6 * 448)
    got = fake_quantize(x, grid, shared if static else None)
    blocks = x.unflatten(-1, (-1, 16))
    scale = (blocks.abs().amax(-1, keepdim=True) / 6 / shared).to(torch.float8_e4m3fn).float() * shared
    want = nearest(blocks, scale, E2M1)
    torch.testing.assert_close(got.double(), want.view_as(x), rtol=1e-5, atol=1e-7)


def test_static_scales_ignore_the_inputs_and_dynamic_ones_follow_them() -> None:
    grid, x = ActivationGrid("int", 8, "tensor"), inputs(4, 64)
    static = x.abs().amax() / 127
    assert torch.equal(fake_quantize(x, grid, static), fake_quantize(x, grid))
    louder = fake_quantize(10 * x, grid, static)
    assert louder.abs().max() <= 127.001 * static
    torch.testing.assert_close(fake_quantize(10 * x, grid), 10 * fake_quantize(x, grid))
    clipped = fake_quantize(x, ActivationGrid("int", 8, "tensor", clip=0.5))
    torch.testing.assert_close(clipped.abs().max(), x.abs().max() / 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "e4m3", "bits": 4}, "do not have 4 bits"),
        ({"format": "ovp", "bits": 8}, "do not have 8 bits"),
        ({"format": "int", "bits": 1}, "between 2 and 16"),
        ({"format": "int", "granularity": "group"}, "group_size goes with"),
        ({"format": "e4m3", "symmetric": False}, "are symmetric"),
        ({"format": "int", "scale_format": "e8m0", "granularity": "group", "group_size": 32}, "floating-point"),
        ({"format": "int", "clip": 0.0}, "clip must be"),
    ],
)
def test_wrong_grids_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationGrid(**settings)


def full_plan(width: int, seed: int = 0) -> InputPlan:
    """Every step but rounding."""
    generator = torch.Generator().manual_seed(seed)
    return InputPlan(
        shift=torch.randn(width, generator=generator),
        scale=torch.rand(width, generator=generator) + 0.5,
        permutation=torch.randperm(width, generator=generator),
        signs=torch.randint(0, 2, (width,), generator=generator) * 2.0 - 1,
        hadamard=32,
    )


def test_steps_of_a_plan_come_in_their_order() -> None:
    x, plan = inputs(3, 64), full_plan(64)
    assert plan.shift is not None and plan.scale is not None and plan.permutation is not None and plan.signs is not None
    want = ((x - plan.shift) / plan.scale)[:, plan.permutation] * plan.signs
    want = (want.double() @ torch.block_diag(sylvester(32), sylvester(32))).float()
    torch.testing.assert_close(transform(x, plan), want, rtol=1e-5, atol=1e-5)
    grids = InputPlan(grid=ActivationGrid("int", 4, "group", 16), tail=16, tail_grid=ActivationGrid("int", 8))
    body, tail = fake_quantize(x[:, :48], ActivationGrid("int", 4, "group", 16)), fake_quantize(x[:, 48:], ActivationGrid("int", 8))
    assert torch.equal(transform(x, grids), torch.cat((body, tail), 1))


def absorb(layer: nn.Linear, plan: InputPlan) -> None:
    """Change a layer such that it does on planned inputs what it did on plain ones."""
    weight = layer.weight.data.double()
    assert plan.shift is not None and plan.scale is not None and plan.signs is not None and plan.hadamard
    layer.bias = nn.Parameter((weight @ plan.shift.double()).to(layer.weight.dtype))
    weight = (weight * plan.scale.double())[:, plan.permutation] * plan.signs.double()
    layer.weight.data = hadamard(weight, plan.hadamard).to(layer.weight.dtype)


def test_a_plan_that_is_absorbed_changes_nothing_after_a_way_through_the_disk(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "dense", "float32").load()
    ids = tiny.tokens().ids
    want = model(ids).logits
    plans = {name: full_plan(layer.in_features, seed) for seed, (name, layer) in enumerate(block_linears(model).items())}
    for name, plan in plans.items():
        absorb(model.get_submodule(name), plan)
    runtime.save(model, tmp_path, plans)
    loaded = runtime.load(tmp_path)
    assert sum(isinstance(m, runtime.PlannedLinear) for m in loaded.modules()) == 14
    torch.testing.assert_close(loaded(ids).logits, want, rtol=1e-4, atol=1e-5)
    for name, plan in plans.items():
        found = loaded.get_submodule(name).inputs
        assert all(torch.equal(getattr(found, part), getattr(plan, part)) for part in ("shift", "scale", "permutation", "signs"))


def test_packed_base_keeps_its_kernels_and_rounded_inputs(dense: DenseModel, tmp_path: Path) -> None:
    model = dense.load()
    layers = block_linears(model)
    plans = {name: InputPlan(grid=ActivationGrid("int", 4, symmetric=False)) for name in layers}
    weights = list(round_layers(layers, packed.Grid(4, 32)))
    runtime.save(model, tmp_path, plans, weights)
    loaded = runtime.load(tmp_path)
    assert {type(m.inner) for m in loaded.modules() if isinstance(m, runtime.PlannedLinear)} == {packed.PackedLinear}
    for name, weight in weights:
        planned, x = loaded.get_submodule(name), inputs(3, weight.codes.shape[1]).bfloat16()
        assert planned.inputs.grid == plans[name].grid
        assert torch.equal(planned.inner.dequantize(), weight.dequantize())
        want = nn.functional.linear(fake_quantize(x, ActivationGrid("int", 4, symmetric=False)).float(), weight.dequantize().float())
        torch.testing.assert_close(planned(x).float(), want, rtol=0.02, atol=0.02 * want.abs().max().item())


def test_evidence_sees_the_inner_layers(dense: DenseModel, tmp_path: Path) -> None:
    from slimbench.harness.engines.transformers import TransformersModel

    model = dense.load()
    layers = block_linears(model)
    shift = {name: InputPlan(shift=torch.zeros(layer.in_features)) for name, layer in layers.items()}
    runtime.save(model, tmp_path, shift, round_layers(layers, packed.Grid(8, None, 8)))
    found = TransformersModel(runtime.load(tmp_path), "cpu").evidence()
    assert found.kernel == "_int_mm"
    (linear,) = [layer for layer in found.layers if layer.role == "linear"]
    assert linear.layer == "PackedLinear" and linear.count == 14 and linear.compute == {"int8": 14}
    held = sum(layer.bytes for layer in found.layers if layer.layer == "PlannedInputs")
    assert held == 4 * sum(layer.in_features for layer in layers.values())


def test_wrong_plans_and_newer_schemas_are_refused(dense: DenseModel, tmp_path: Path) -> None:
    model = dense.load()
    name = "model.layers.0.mlp.down_proj"
    for plan, message in (
        (InputPlan(shift=torch.zeros(3)), "shift has shape"),
        (InputPlan(hadamard=48), "Hadamard blocks of 48"),
        (InputPlan(grid=ActivationGrid("int", 4, "group", 48)), "groups of 48 do not divide 128"),
    ):
        with pytest.raises(ValueError, match=message):
            runtime.save(model, tmp_path, {name: plan})
    runtime.save(model, tmp_path, {name: InputPlan(shift=torch.zeros(128))})
    described = json.loads((tmp_path / runtime.DESCRIPTION).read_text())
    (tmp_path / runtime.DESCRIPTION).write_text(json.dumps(described | {"layers": {}}))
    with pytest.raises(ValueError, match="no layer wants"):
        runtime.load(tmp_path)
    (tmp_path / runtime.DESCRIPTION).write_text(json.dumps(described | {"schema": runtime.SCHEMA + 1}))
    with pytest.raises(ValueError, match="newer"):
        runtime.load(tmp_path)
