"""Methods that round weights and activations, on a tiny model, against the definitions of their papers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.methods.base import Claim, DenseModel, Method, Unsupported
from slimbench.methods.core.layers import block_linears
from slimbench.methods.core.walk import walk
from slimbench.methods.formats import packed, runtime
from slimbench.methods.quantization.activation.atom import Atom
from slimbench.methods.quantization.activation.fp8 import FP8Dynamic, FP8Static, FP8Weight
from slimbench.methods.quantization.activation.fptq import FPTQ, equalising_scale
from slimbench.methods.quantization.activation.microscaling import NVFP4, Microscaling
from slimbench.methods.quantization.activation.olive import OliVe, best_scale
from slimbench.methods.quantization.activation.outlier_suppression import OutlierSuppressionPlus, suppress, threshold_scale
from slimbench.methods.quantization.activation.quarot import QuaRot, QuaRotRTN
from slimbench.methods.quantization.activation.rptq import RPTQ
from slimbench.methods.quantization.activation.rtn_activation import RTNActivation
from slimbench.methods.quantization.activation.smoothquant import SmoothQuant, SmoothQuantStatic, smooth
from slimbench.methods.quantization.activation.zeroquant import ZeroQuant, ZeroQuantMixed
from slimbench.methods.quantization.activation.zeroquant_fp import ZeroQuantFP
from tests.support import tiny
from tests.support.architectures import make

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
NORMED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("exact"), "float32")


def run(method: Method, dense: DenseModel, out: Path) -> Claim:
    out.mkdir(exist_ok=True)
    method.check(dense.shape)
    return method.compress(dense, tiny.tokens(16, 32) if method.needs.calibration else None, out)


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(tiny.tokens(4, 32, seed=1).ids).logits.float()


def activations(dense: DenseModel) -> dict[str, Tensor]:
    """The inputs of each linear layer of the dense model on the calibration tokens."""
    caught: dict[str, list[Tensor]] = {}
    for block in walk(dense.load(), tiny.tokens(16, 32).ids):
        block.observe(lambda name, x: caught.setdefault(name, []).append(x.float()))
    return {name: torch.cat(parts) for name, parts in caught.items()}


def distance(made: Any, dense: DenseModel) -> float:
    """Error of the logits relative to their size."""
    want = logits(dense.load())
    return float((logits(made) - want).norm() / want.norm())


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_smoothing_scales_are_those_of_the_paper_and_change_nothing(exact: DenseModel, alpha: float) -> None:
    model, before = exact.load(), exact.load()
    smooth(model, tiny.tokens(16, 32), alpha, exact)
    torch.testing.assert_close(logits(model), logits(before), rtol=1e-4, atol=1e-5)
    seen = activations(exact)
    for name in (n for n in seen if n.endswith(NORMED)):
        x, weights = seen[name], [before.get_submodule(n).weight for n in seen if n.endswith(NORMED) and torch.equal(seen[n], seen[name])]
        assert len(weights) in (2, 3)
        want = x.abs().amax(0) ** alpha / torch.cat(weights).abs().amax(0) ** (1 - alpha)
        found = model.get_submodule(name).weight / before.get_submodule(name).weight
        torch.testing.assert_close(found.median(0).values, want, rtol=1e-3, atol=1e-5)


def test_smoothquant_multiplies_integers(dense: DenseModel, tmp_path: Path) -> None:
    claim = run(SmoothQuant(), dense, tmp_path)
    assert claim == Claim("packed", bits=8, activation_bits=8, details={"alpha": 0.5})
    loaded = packed.load(tmp_path)
    assert {layer.kernel for layer in loaded.modules() if isinstance(layer, packed.PackedLinear)} == {"torch int_mm w8a8"}
    assert 0 < distance(loaded, dense) < 0.05


def test_smoothquant_smooths_opt_whose_norms_have_biases(tmp_path: Path) -> None:
    for folder in ("source", "out"):
        (tmp_path / folder).mkdir()
    make("opt").save_pretrained(tmp_path / "source")
    dense = tiny.dense_model(tmp_path / "source", "float32")
    model, layer = dense.load(), "model.decoder.layers.1.fc1"
    smooth(model, tiny.tokens(16, 32), 0.5, dense)
    torch.testing.assert_close(logits(model), logits(dense.load()), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(model.get_submodule(layer).weight, dense.load().get_submodule(layer).weight, rtol=0.05)
    assert run(SmoothQuant(), dense, tmp_path / "out").activation_bits == 8
    assert 0 < distance(packed.load(tmp_path / "out"), dense) < 0.05


def test_static_smoothquant_has_one_scale_for_the_smoothed_inputs(dense: DenseModel, tmp_path: Path) -> None:
    claim = run(SmoothQuantStatic(), dense, tmp_path)
    assert claim.simulated and claim.activation_bits == 8
    loaded, seen = runtime.load(tmp_path), activations(dense)
    assert 0 < distance(loaded, dense) < 0.05
    for name, x in seen.items():
        planned = loaded.get_submodule(name)
        assert planned.inputs.static_scale.shape == ()
        if not name.endswith(NORMED):
            torch.testing.assert_close(planned.inputs.static_scale, x.abs().amax() / 127, rtol=0.05, atol=0)


def dense_and_made(dense: DenseModel, out: Path) -> list[tuple[str, Tensor, Tensor, runtime.PlannedInputs]]:
    """Name, dense weight, rounded weight and inputs of each layer with a plan."""
    source, loaded = dense.load(), runtime.load(out)
    names = [name for name, layer in loaded.named_modules() if isinstance(layer, runtime.PlannedLinear)]
    found = [(name, loaded.get_submodule(name)) for name in names]
    return [
        (
            name,
            source.get_submodule(name).weight.data,
            layer.inner.dequantize() if isinstance(layer.inner, packed.PackedLinear) else layer.inner.weight.data,  # type: ignore[union-attr]
            layer.inputs,  # type: ignore[union-attr]
        )
        for name, layer in found
    ]


@pytest.mark.parametrize(("bits", "furthest"), [(8, 0.15), (4, 0.5)])
def test_rtn_rounds_packed_weights_and_inputs_of_each_token(dense: DenseModel, tmp_path: Path, bits: Any, furthest: float) -> None:
    claim = run(RTNActivation(activation_bits=bits), dense, tmp_path)
    assert (claim.bits, claim.group_size, claim.activation_bits, claim.simulated) == (4, 64, bits, True)
    made = dense_and_made(dense, tmp_path)
    assert len(made) == 14 and all(inputs.grid == runtime.ActivationGrid("int", bits) for *_, inputs in made)
    for _, weight, rounded, inputs in made:
        groups, scale = weight.double().unflatten(1, (-1, 64)), None
        scale = (groups.abs().amax(-1, keepdim=True) / 7.5).bfloat16().double()
        assert torch.equal(rounded, ((groups / scale).round().clamp(-8, 7) * scale).flatten(1).bfloat16())
        x = torch.randn(5, weight.shape[1])
        steps = x.double().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        torch.testing.assert_close(inputs(x).double(), (x / steps).round() * steps, rtol=1e-4, atol=1e-6)
    assert 0 < distance(runtime.load(tmp_path), dense) < furthest


def test_more_bits_of_the_inputs_are_nearer(dense: DenseModel, tmp_path: Path) -> None:
    found = []
    for bits, group in ((4, None), (4, 32), (6, None), (8, None)):
        out = tmp_path / f"{bits}-{group}"
        run(RTNActivation(bits=8, group_size=None, activation_bits=bits, activation_group_size=group), dense, out)  # type: ignore[arg-type]
        found.append(distance(runtime.load(out), dense))
    assert found == sorted(found, reverse=True)


def e4m3(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize(("method", "activation_bits"), [(FP8Weight(), None), (FP8Dynamic(), 8)], ids=["weight", "dynamic"])
def test_fp8_rows_are_the_cast_of_torch(dense: DenseModel, tmp_path: Path, method: Method, activation_bits: int | None) -> None:
    claim = run(method, dense, tmp_path)
    assert (claim.bits, claim.activation_bits, claim.simulated) == (8, activation_bits, False)
    made = packed.load(tmp_path)
    for name, layer in block_linears(dense.load()).items():
        scale = (layer.weight.detach().float().abs().amax(1, keepdim=True) / 448).bfloat16()
        rounded = made.get_submodule(name)
        assert isinstance(rounded, packed.PackedLinear) and rounded.grid == packed.Grid(8, None, activation_bits, "e4m3")  # type: ignore[arg-type]
        assert torch.equal(rounded.dequantize(), e4m3(layer.weight.detach(), scale.float()).bfloat16())
    assert 0 < distance(made, dense) < 0.1


def test_static_fp8_has_the_largest_calibrated_input_as_448(dense: DenseModel, tmp_path: Path) -> None:
    run(FP8Static(), dense, tmp_path)
    seen = activations(dense)
    for name, weight, rounded, inputs in dense_and_made(dense, tmp_path):
        assert torch.equal(rounded, e4m3(weight, weight.float().abs().amax() / 448).bfloat16())
        torch.testing.assert_close(inputs.static_scale, seen[name].abs().amax() / 448)
        torch.testing.assert_close(inputs(1e4 * torch.ones(1, weight.shape[1])).amax(), seen[name].abs().amax())
    assert 0 < distance(runtime.load(tmp_path), dense) < 0.1


@pytest.mark.parametrize(("number", "furthest"), [("e2m1", 0.6), ("e4m3", 0.1)])
def test_mx_scales_are_powers_of_two(dense: DenseModel, tmp_path: Path, number: Any, furthest: float) -> None:
    claim = run(Microscaling(number=number), dense, tmp_path)
    bits = 4 if number == "e2m1" else 8
    assert (claim.bits, claim.group_size, claim.details["stored_bits"], claim.simulated) == (bits, 32, bits + 0.25, True)
    exponent, points = (2, E2M1) if number == "e2m1" else (8, torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float())
    for _, weight, rounded, inputs in dense_and_made(dense, tmp_path):
        blocks = weight.float().unflatten(1, (-1, 32))
        scale = torch.exp2(torch.floor(torch.log2(blocks.abs().amax(-1, keepdim=True))) - exponent)
        codes = rounded.float().unflatten(1, (-1, 32)) / scale
        assert torch.isin(codes.abs(), points).all()
        nearest = ((blocks / scale).abs().clamp_max(points.max()).unsqueeze(-1) - points).abs().amin(-1)
        torch.testing.assert_close((codes.abs() - (blocks / scale).abs().clamp_max(points.max())).abs(), nearest)
        assert inputs.grid is not None and inputs.grid.scale_format == "e8m0" and inputs.static_scale is None
    assert 0 < distance(runtime.load(tmp_path), dense) < furthest


def test_nvfp4_has_scales_in_e4m3_below_those_of_calibration(dense: DenseModel, tmp_path: Path) -> None:
    claim = run(NVFP4(), dense, tmp_path)
    assert (claim.bits, claim.group_size, claim.details["stored_bits"]) == (4, 16, 4.5)
    seen = activations(dense)
    for name, weight, rounded, inputs in dense_and_made(dense, tmp_path):
        torch.testing.assert_close(inputs.static_scale, seen[name].abs().amax() / (6 * 448))
        whole, blocks = weight.float().abs().amax() / (6 * 448), weight.float().unflatten(1, (-1, 16))
        scale = e4m3(blocks.abs().amax(-1, keepdim=True) / 6, whole)
        codes = rounded.float().unflatten(1, (-1, 16)) / scale
        distances = (codes.abs().unsqueeze(-1) - E2M1).abs().amin(-1)
        assert (distances < 0.03).all() and (codes - blocks / scale).abs().max() <= 1.02
    assert 0 < distance(runtime.load(tmp_path), dense) < 0.5


def test_weights_alone_leave_the_inputs_as_they_are(dense: DenseModel, tmp_path: Path) -> None:
    for method in (Microscaling(activations=False), NVFP4(activations=False)):
        out = tmp_path / type(method).__name__
        assert run(method, dense, out).activation_bits is None
        loaded = runtime.load(out)
        assert not any(isinstance(layer, runtime.PlannedLinear) for layer in loaded.modules())
        assert 0 < distance(loaded, dense) < 0.5


def by_groups_of_rows(weight: Tensor, bits: int, groups: int) -> Tensor:
    rows = weight.double().view(groups, -1)
    scale = (rows.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 0.5)).bfloat16().double()
    return ((rows / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale).view_as(weight).bfloat16()


def test_zeroquant_has_a_scale_for_each_group_of_rows(dense: DenseModel, tmp_path: Path) -> None:
    claim = run(ZeroQuant(groups=16), dense, tmp_path / "8")
    assert claim == Claim("packed", bits=8, activation_bits=8, details={"groups": 16})
    source, loaded = dense.load(), packed.load(tmp_path / "8")
    layers = {name: layer for name, layer in loaded.named_modules() if isinstance(layer, packed.PackedLinear)}
    assert len(layers) == 14 and {layer.kernel for layer in layers.values()} == {"torch int_mm w8a8"}
    for name, layer in layers.items():
        assert torch.equal(layer.dequantize(), by_groups_of_rows(source.get_submodule(name).weight, 8, 16))
    assert 0 < distance(loaded, dense) < 0.05
    with pytest.raises(Unsupported, match="64 groups do not divide the 32 outputs"):
        run(ZeroQuant(), dense, tmp_path / "64")


def test_zeroquant_mixes_four_bits_in_mlps_with_eight_in_attention(dense: DenseModel, tmp_path: Path) -> None:
    claim = run(ZeroQuantMixed(groups=16), dense, tmp_path)
    attention, mlp = 64 * 64 * 2 + 64 * 32 * 2, 3 * 64 * 128
    assert claim.bits == (8 * attention + 4 * mlp) / (attention + mlp) and claim.simulated
    for name, weight, rounded, inputs in dense_and_made(dense, tmp_path):
        assert torch.equal(rounded, by_groups_of_rows(weight, 4 if "mlp" in name else 8, 16))
        assert inputs.grid == runtime.ActivationGrid("int", 8)
    assert 0.01 < distance(runtime.load(tmp_path), dense) < 0.2


def outlying(folder: Path) -> DenseModel:
    """A model in which two hidden channels are far larger than the others, so that rounding by token suffers; its blocks weigh more."""
    from safetensors.torch import load_file, save_file

    made = tiny.save_model(folder, tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, [5, 40]] *= 10
    for name in (n for n in tensors if n.endswith(("o_proj.weight", "down_proj.weight"))):
        tensors[name] *= 8
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return made


def test_rotation_makes_four_bits_of_the_inputs_bearable(tmp_path: Path) -> None:
    dense = outlying(tmp_path / "dense")
    errors = {}
    for name, method in (("rtn", RTNActivation(bits=8, group_size=None, activation_bits=4)), ("quarot", QuaRotRTN(bits=8))):
        claim = run(method, dense, tmp_path / name)
        assert (claim.activation_bits, claim.simulated) == (4, True)
        errors[name] = distance(runtime.load(tmp_path / name), dense)
    assert errors["quarot"] < 0.65 * errors["rtn"]


def test_quarot_with_gptq_is_nearer_than_to_nearest(dense: DenseModel, tmp_path: Path) -> None:
    errors = []
    for method in (QuaRot(bits=3, activation_bits=8, activation_clip=1.0), QuaRotRTN(bits=3, activation_bits=8, activation_clip=1.0)):
        out = tmp_path / type(method).__name__
        assert run(method, dense, out).details["transforms"] == [64, 128]
        loaded = runtime.load(out)
        assert loaded.lm_head.weight.data_ptr() != loaded.model.embed_tokens.weight.data_ptr()  # type: ignore[union-attr]
        assert {layer.inner.kernel_missing for layer in loaded.modules() if isinstance(layer, runtime.PlannedLinear)} == {None}
        errors.append(distance(loaded, dense))
    assert 0 < errors[0] < errors[1] < 0.8


def test_outlier_suppression_centres_channels_and_changes_nothing(exact: DenseModel) -> None:
    model = exact.load()
    grid = runtime.ActivationGrid("int", 8)
    shifts = suppress(model, tiny.tokens(16, 32), grid, 5, exact)
    assert {name.rpartition(".")[2] for name in shifts} == set(NORMED)
    caught: dict[str, list[Tensor]] = {}
    with runtime.planned(model, {name: runtime.InputPlan(shift=shift) for name, shift in shifts.items()}):
        torch.testing.assert_close(logits(model), logits(exact.load()), rtol=1e-3, atol=2e-5)
        for block in walk(model, tiny.tokens(16, 32).ids):
            block.observe(lambda name, x: caught.setdefault(name, []).append(x))
    for name in shifts:
        x = torch.cat(caught[name])
        torch.testing.assert_close(x.amax(0), -x.amin(0), rtol=1e-3, atol=1e-5)
    largest = torch.tensor([0.5, 2.0, 8.0])
    assert threshold_scale(largest, 2.0).tolist() == [1, 1, 4]


def test_outlier_suppression_multiplies_integers_or_simulates(dense: DenseModel, tmp_path: Path) -> None:
    errors = []
    for bits, simulated in ((8, False), (6, True)):
        out = tmp_path / str(bits)
        claim = run(OutlierSuppressionPlus(bits=bits, thresholds=4), dense, out)  # type: ignore[arg-type]
        assert (claim.bits, claim.activation_bits, claim.simulated, claim.details) == (bits, bits, simulated, {"shifts_at_run_time": 10})
        loaded = runtime.load(out)
        kernels = {layer.kernel for layer in loaded.modules() if isinstance(layer, packed.PackedLinear)}
        assert kernels == (set() if simulated else {"torch int_mm w8a8"})
        assert all(loaded.get_submodule(f"model.layers.{i}.self_attn.v_proj").inner.bias is not None for i in (0, 1))
        errors.append(distance(loaded, dense))
    assert 0 < errors[0] < 0.05 and errors[0] < errors[1] < 0.2


@pytest.mark.parametrize("scales", ["free", "power-of-two"])
def test_zeroquant_fp_puts_weights_on_e2m1(dense: DenseModel, tmp_path: Path, scales: Any) -> None:
    claim = run(ZeroQuantFP(group_size=32, scales=scales), dense, tmp_path)
    assert (claim.bits, claim.group_size, claim.activation_bits, claim.simulated) == (4, 32, 8, True)
    seen, moved = activations(dense), 0
    for name, weight, rounded, inputs in dense_and_made(dense, tmp_path):
        groups = weight.float().unflatten(1, (-1, 32))
        scale = groups.abs().amax(-1, keepdim=True) / 6
        scale = torch.exp2(torch.ceil(torch.log2(scale))) if scales == "power-of-two" else scale
        codes = rounded.float().unflatten(1, (-1, 32)) / scale
        assert ((codes.abs().unsqueeze(-1) - E2M1).abs().amin(-1) < 0.03).all()
        assert inputs.grid == runtime.ActivationGrid("e4m3")
        nearest = runtime.fake_quantize(groups, runtime.ActivationGrid("e2m1", 4, "tensor"), scale).flatten(1)
        moved += int((seen[name] @ (rounded - weight).float().T).norm() < (seen[name] @ (nearest - weight.float()).T).norm())
    assert moved >= 12


def test_atom_keeps_the_loudest_channels_in_eight_bits(tmp_path: Path) -> None:
    dense = outlying(tmp_path / "dense")
    claim = run(Atom(outliers=32, group_size=32), dense, tmp_path)
    assert claim.bits is not None and claim.simulated and claim.activation_bits == 4
    inputs_of = {name: layer.in_features for name, layer in dense.load().named_modules() if name.endswith("_proj")}
    weights = {name: dense.load().get_submodule(name).weight for name in inputs_of}
    eight = sum(32 * w.shape[0] for w in weights.values()) / sum(w.numel() for w in weights.values())
    assert claim.bits == pytest.approx(4 + 4 * eight)
    seen = activations(dense)
    for name, weight, rounded, inputs in dense_and_made(dense, tmp_path):
        assert inputs.permutation is not None and inputs.tail == 32
        squares = seen[name].square().mean(0)[inputs.permutation]
        assert squares[-32:].min() >= 0.999 * squares[:-32].max()
        body = rounded[:, :-32].float().unflatten(1, (-1, 32))
        assert max(len(group.unique()) for row in body for group in row) <= 15
        assert (rounded[:, -32:] - weight[:, inputs.permutation][:, -32:]).abs().max() < 0.1 * weight.abs().max()
    plain = tmp_path / "plain"
    run(RTNActivation(bits=4, group_size=32, activation_bits=4, activation_group_size=32), dense, plain)
    assert distance(runtime.load(tmp_path), dense) < 0.7 * distance(runtime.load(plain), dense)


def test_fptq_equalises_in_the_middle_and_scales_tokens_beyond(exact: DenseModel, dense: DenseModel, tmp_path: Path) -> None:
    largest = torch.tensor([0.1, 2.0, 30.0, 1e3])
    torch.testing.assert_close(largest / equalising_scale(largest), torch.log2(2 + largest))
    model = exact.load()
    plans = FPTQ(low=0, high=1e9).plans(model, tiny.tokens(16, 32), exact)
    torch.testing.assert_close(logits(model), logits(exact.load()), rtol=1e-3, atol=2e-5)
    for name, x in activations(exact).items():
        top, scale = x.abs().amax(0), plans[name].static_scale
        assert scale is not None
        if name.endswith(NORMED):
            torch.testing.assert_close(scale * 127, torch.log2(2 + top).max())
    left = exact.load()
    plans = FPTQ(low=1e9, high=1e9).plans(left, tiny.tokens(16, 32), exact)
    assert all(torch.equal(a, b) for a, b in zip(left.parameters(), exact.load().parameters(), strict=True))
    assert all(plan.static_scale is not None for plan in plans.values())
    assert run(FPTQ(low=0, high=0), dense, tmp_path / "token").details == {"static_layers": 0, "token_layers": 14}
    claim = run(FPTQ(group_size=32), dense, tmp_path / "default")
    assert (claim.bits, claim.group_size, claim.activation_bits, claim.simulated) == (4, 32, 8, True)
    assert 0 < distance(runtime.load(tmp_path / "default"), dense) < 0.3


def test_rptq_clusters_have_a_static_grid_over_their_range(dense: DenseModel, tmp_path: Path) -> None:
    claim = run(RPTQ(clusters=5), dense, tmp_path)
    assert (claim.bits, claim.activation_bits, claim.simulated) == (4, 8, True)
    seen = activations(dense)
    for name, weight, rounded, inputs in dense_and_made(dense, tmp_path):
        order, scale, offset = inputs.permutation, inputs.static_scale, inputs.static_offset
        assert order is not None and scale is not None and offset is not None
        assert torch.equal(order.sort().values, torch.arange(weight.shape[1]))
        changes = ((scale[1:] != scale[:-1]) | (offset[1:] != offset[:-1])).sum()
        assert 1 <= changes < 5
        x = seen[name][:, order]
        assert ((inputs(seen[name]) - x).abs() <= 0.51 * scale + 0.01 * x.abs()).all()
        assert (rounded.float() - weight[:, order].float()).abs().max() < 0.5 * weight.float().abs().max()
    assert 0 < distance(runtime.load(tmp_path), dense) < 0.3


def test_more_clusters_are_nearer(tmp_path: Path) -> None:
    dense = outlying(tmp_path / "dense")
    errors = []
    for clusters in (1, 8):
        run(RPTQ(bits=8, activation_bits=4, clusters=clusters), dense, tmp_path / str(clusters))
        errors.append(distance(runtime.load(tmp_path / str(clusters)), dense))
    assert errors[1] < 0.8 * errors[0]


def test_olive_has_one_scale_for_a_weight_and_one_for_the_inputs(dense: DenseModel, tmp_path: Path) -> None:
    points = torch.tensor([*range(8), 12, 16, 24, 32, 48, 64, 96]).float()
    for activations_too in (True, False):
        out = tmp_path / str(activations_too)
        claim = run(OliVe(activations=activations_too), dense, out)
        assert (claim.bits, claim.activation_bits, claim.simulated) == (4, 4 if activations_too else None, True)
        assert 0 < distance(runtime.load(out), dense) < 0.6
    for _, weight, rounded, inputs in dense_and_made(dense, tmp_path / "True"):
        scale = best_scale(weight.float())
        codes = (rounded.float() / scale).abs()
        assert ((codes.unsqueeze(-1) - points).abs().amin(-1) < 0.01 * codes.clamp_min(1)).all()
        assert (codes.unflatten(1, (-1, 2)).amin(-1)[codes.unflatten(1, (-1, 2)).amax(-1) > 8] == 0).all()
        assert inputs.static_scale is not None and inputs.static_scale.shape == () and inputs.grid is not None


def test_olive_is_nearer_than_integers_where_there_are_outliers() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 20
    pairs = runtime.fake_quantize(x, runtime.ActivationGrid("ovp", 4, "tensor"), best_scale(x))
    integers = runtime.fake_quantize(x, runtime.ActivationGrid("int", 4, "tensor"))
    assert (pairs - x).norm() < 0.5 * (integers - x).norm()
