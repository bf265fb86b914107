"""Methods whose weights are indices into tables of levels, each against its definition, on a tiny random model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.catalogue import check
from methods._common import block_linears
from methods.base import Claim, DenseModel, Method
from methods.kernels import codebook
from methods.kernels.codebook import CodebookLinear, CodebookWeight
from methods.quantization import _levels
from methods.quantization.small_floats import MXFP4, NVFP4, FP8Weight
from tests.unit import tiny

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"))


def source(dense: DenseModel) -> dict[str, Tensor]:
    return {name: layer.weight.detach() for name, layer in block_linears(dense.load()).items()}


def run(method: Method, dense: DenseModel, out: Path) -> tuple[Claim, dict[str, CodebookWeight]]:
    method.check(dense.shape)
    claim = method.compress(dense, tiny.tokens() if method.needs.calibration else None, out)
    loaded = codebook.load(out)
    layers = {name: layer.weight_in_parts for name, layer in loaded.named_modules() if isinstance(layer, CodebookLinear)}
    assert set(layers) == set(source(dense))
    return claim, layers


def implied(weights: dict[str, CodebookWeight], row: Any) -> float:
    """Bits of a weight where `row(out, in)` bits are stored for each layer."""
    return sum(row(*w.shape) for w in weights.values()) / sum(w.shape[0] * w.shape[1] for w in weights.values())


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Distance of each number to the nearest level."""
    return (x.unsqueeze(-1) - levels).abs().amin(-1)


@pytest.mark.parametrize("name", ["fp8-weight", "mxfp4-weight", "nvfp4-weight"])
def test_claim_is_kept(name: str) -> None:
    facts = check(name)
    assert facts["finite"] and not [flag for flag in facts["flags"] if flag.startswith("claims")]
    assert facts["effective_bits"] == pytest.approx(facts["claim"]["details"]["stored_bits"], rel=1e-3)


def test_e2m1_levels_and_rounding_to_even() -> None:
    assert torch.equal(_levels.e2m1(), torch.cat([E2M1, -E2M1]))
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, 7.0, 0.26, -0.1, -0.75])
    want = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, 0.5, 0.0, -1.0])
    assert torch.equal(_levels.e2m1()[_levels.to_e2m1(ties).long()], want)
    x = torch.linspace(-6, 6, 4001)
    got = _levels.e2m1()[_levels.to_e2m1(x).long()]
    assert torch.equal((got - x).abs(), nearest(x, _levels.e2m1()))


def test_e2m1_codes_are_those_of_torchao() -> None:
    kernels = pytest.importorskip("torchao.prototype.mx_formats.kernels")
    x = torch.cat([torch.randn(4000) * 3, torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])])
    ours, theirs = _levels.to_e2m1(x), kernels.f32_to_f4_unpacked(x)
    assert torch.equal(_levels.e2m1()[ours.long()], _levels.e2m1()[theirs.long()])


def test_int4_levels() -> None:
    x = torch.tensor([-9.0, -8.0, -0.6, 0.4, 6.5, 8.0])
    assert torch.equal(_levels.int4()[_levels.to_int4(x).long()], torch.tensor([-8.0, -8.0, -1.0, 0.0, 6.0, 7.0]))


def test_fp8_is_the_cast_of_torch(dense: DenseModel, tmp_path: Path) -> None:
    claim, weights = run(FP8Weight(), dense, tmp_path)
    for name, weight in source(dense).items():
        scale = (weight.float().abs().amax(1, keepdim=True) / 448).bfloat16()
        cast = (weight.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(weights[name].dequantize(), (cast.double() * scale.double()).bfloat16())
    assert claim.bits == 8
    table = 8 * 256 * 2 / len(weights)
    assert claim.details["stored_bits"] == pytest.approx(implied(weights, lambda o, i: 8 * o * i + 16 * o + table), rel=1e-3)


def test_mxfp4_scales_are_powers_of_two_and_weights_nearest(dense: DenseModel, tmp_path: Path) -> None:
    claim, weights = run(MXFP4(), dense, tmp_path)
    for name, weight in source(dense).items():
        blocks = weight.double().unflatten(1, (-1, 32))
        scale = torch.exp2(blocks.abs().amax(-1).log2().floor() - 2)
        scales = weights[name].scales
        assert scales is not None and scales.dtype is torch.float8_e8m0fnu and torch.equal(scales[0].double(), scale)
        got = weights[name].dequantize().double().unflatten(1, (-1, 32)) / scale.unsqueeze(-1)
        x = blocks / scale.unsqueeze(-1)
        assert torch.allclose((got - x).abs(), nearest(x, _levels.e2m1().double()), atol=1e-9)
    assert claim.details["stored_bits"] == pytest.approx(4 + 8 / 32, rel=0.01)


def test_mxfp4_equals_torchao(dense: DenseModel, tmp_path: Path) -> None:
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    _, weights = run(MXFP4(), dense, tmp_path)
    for name, weight in source(dense).items():
        theirs = mx.MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32)
        assert torch.equal(weights[name].dequantize(), theirs.dequantize(torch.bfloat16))


def test_nvfp4_has_two_levels_of_scales(dense: DenseModel, tmp_path: Path) -> None:
    claim, weights = run(NVFP4(), dense, tmp_path)
    for name, weight in source(dense).items():
        blocks = weight.double().unflatten(1, (-1, 16))
        scales, whole = weights[name].scales, weights[name].tensor_scale
        assert scales is not None and whole is not None and scales.dtype is torch.float8_e4m3fn
        assert float(whole) == pytest.approx(float(weight.abs().max()) / 6 / 448) and float(scales.float().max()) == 448
        step = scales[0].double() * whole.double()
        assert torch.allclose(step, blocks.abs().amax(-1) / 6, rtol=2**-4)
        got = weights[name].dequantize().double().unflatten(1, (-1, 16))
        error = (got - blocks).abs()
        assert (
            error <= nearest(blocks / step.unsqueeze(-1), _levels.e2m1().double()) * step.unsqueeze(-1) + 2**-8 * got.abs() + 1e-9
        ).all()
    assert claim.details["stored_bits"] == pytest.approx(4 + 8 / 16, rel=0.01)


def test_nvfp4_equals_torchao(dense: DenseModel, tmp_path: Path) -> None:
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    _, weights = run(NVFP4(), dense, tmp_path)
    for name, weight in source(dense).items():
        whole = nv.per_tensor_amax_to_scale(weight.abs().max())
        theirs = nv.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=whole).dequantize(torch.bfloat16)
        differing = (weights[name].dequantize() != theirs).float().mean()
        assert differing < 1e-3
