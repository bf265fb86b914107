"""Methods whose weights are indices into tables of levels, each against its definition, on a tiny random model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.harness.config.registry import entry
from slimbench.harness.config.sources import shipped
from slimbench.harness.run.proofs.method import check
from slimbench.methods.base import Claim, DenseModel, Method
from slimbench.methods.core.layers import block_linears
from slimbench.methods.core.second_order import Moments
from slimbench.methods.formats import codebook
from slimbench.methods.formats.codebook import CodebookLinear, CodebookWeight
from slimbench.methods.quantization.codebook.bcq import BCQ
from slimbench.methods.quantization.codebook.gobo import GOBO
from slimbench.methods.quantization.codebook.kmeans import KMeans
from slimbench.methods.quantization.codebook.squeezellm import SqueezeLLM, fisher_diagonal
from slimbench.methods.quantization.codebook.vptq import VPTQ
from slimbench.methods.quantization.grids import k_means as _kmeans
from slimbench.methods.quantization.grids import levels as _levels
from slimbench.methods.quantization.grids.codebook_layers import FORMAT
from slimbench.methods.quantization.weight.blockwise import Blockwise8Bit
from slimbench.methods.quantization.weight.mofq import MoFQ
from slimbench.methods.quantization.weight.small_floats import MXFP4, NVFP4
from tests.support import tiny

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


@pytest.mark.parametrize("name", [name for name in shipped("method") if entry(name).method.produces == FORMAT])
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


def squared_error(x: Tensor, centroids: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted squared distance of the numbers of each row to the nearest of its centroids, float64 [rows]."""
    distance = (x.double().unsqueeze(-1) - centroids.double().unsqueeze(1)).square().amin(-1)
    return (distance if weights is None else distance * weights.double()).sum(1)


@pytest.mark.parametrize("weighted", [False, True])
def test_kmeans_is_a_fixed_point_and_never_worse_than_even_levels(weighted: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 200) ** 3
    weights = torch.rand(12, 200) ** 4 if weighted else None
    found = _kmeans.kmeans_rows(x, 8, weights, steps=500)
    assert (found.diff(dim=1) >= 0).all()
    nearest_one = (x.unsqueeze(-1) - found.unsqueeze(1)).abs().argmin(-1)
    for row in range(12):
        for level in range(8):
            mine = nearest_one[row] == level
            if mine.any():
                shares = torch.ones(200) if weights is None else weights[row]
                mean = (x[row] * shares)[mine].sum() / shares[mine].sum()
                assert float(found[row, level]) == pytest.approx(float(mean), abs=1e-3)
    even = torch.stack([torch.linspace(float(row.min()), float(row.max()), 8) for row in x])
    assert (squared_error(x, found, weights) <= squared_error(x, even, weights) + 1e-6).all()
    assert (squared_error(x, found, weights) < 0.9 * squared_error(x, even, weights)).float().mean() > 0.5
    for _ in range(20):
        moved = found + 1e-4 * torch.randn_like(found)
        assert (squared_error(x, moved, weights) >= squared_error(x, found, weights) - 1e-5).all()


def test_kmeans_finds_few_distinct_values_and_ignores_weightless_ones() -> None:
    x = torch.tensor([[0.0, 1.0, 1.0, 5.0, 5.0, 9.0, 100.0, -100.0]])
    weights = torch.tensor([[1.0, 1, 1, 1, 1, 1, 0, 0]])
    assert float(squared_error(x, _kmeans.kmeans_rows(x, 4, weights), weights)) == pytest.approx(0, abs=1e-9)
    assert torch.equal(_kmeans.nearest(x, torch.tensor([[0.0, 1, 5, 9]]))[0, :6], torch.tensor([0, 1, 1, 2, 2, 3], dtype=torch.uint8))
    assert _kmeans.kmeans_rows(torch.zeros(2, 16), 4).abs().max() == 0


def test_running_sums_give_both_errors() -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(5, 300), torch.rand(5, 300)
    rows = _kmeans.SortedRows.of(x, weights)
    centroids = torch.randn(5, 8).sort(dim=1).values
    base = (x.double().square() * weights.double()).sum(1)
    assert torch.allclose(rows.squared_error(centroids) + base, squared_error(x, centroids, weights), rtol=1e-5)
    distance = (x.unsqueeze(-1) - centroids.unsqueeze(1)).abs().amin(-1)
    assert torch.allclose(rows.absolute_error(centroids), (distance * weights).double().sum(1), rtol=1e-5)


def test_vectors_of_few_kinds_are_found_exactly() -> None:
    torch.manual_seed(0)
    kinds = torch.randn(8, 4)
    x = kinds[torch.arange(8).repeat(50)]
    found = _kmeans.kmeans_vectors(x, 16, torch.rand(400) + 0.1, 30, torch.Generator().manual_seed(0))
    assert float(_kmeans.nearest_vectors(x, found)[1].max()) < 1e-5
    index, error = _kmeans.nearest_vectors(torch.randn(50, 4), kinds, chunk_numbers=64)
    assert len(index) == len(error) == 50


@pytest.mark.parametrize("table", ["layer", "row"])
def test_kmeans_levels_are_better_than_rounding_to_even_ones(dense: DenseModel, tmp_path: Path, table: Any) -> None:
    claim, weights = run(KMeans(bits=3, table=table), dense, tmp_path)
    for name, weight in source(dense).items():
        rows = weight.float() if table == "row" else weight.float().reshape(1, -1)
        even = torch.stack([torch.linspace(float(row.min()), float(row.max()), 8) for row in rows])
        error = (weights[name].dequantize().double() - weight.double()).square().sum()
        assert error < squared_error(rows, even).sum()
        levels = weights[name].codebook[0, :, :, 0]
        assert error == pytest.approx(float(squared_error(rows, levels).sum()), rel=1e-6)
        assert levels.shape == (len(rows), 8)
    bits = implied(weights, lambda o, i: 3 * o * i + 8 * 16 * (o if table == "row" else 1))
    assert claim.details["stored_bits"] == pytest.approx(bits, rel=1e-3)


def test_fisher_is_the_mean_squared_gradient(dense: DenseModel) -> None:
    model, ids = dense.load(dtype=torch.float32), tiny.tokens(3).ids
    found = fisher_diagonal(model, ids)
    name, layer = next(iter(block_linears(model).items()))
    want = torch.zeros_like(layer.weight)
    for row in ids:
        logits = model(row[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, row[1:])
        want += torch.autograd.grad(loss, layer.weight)[0].square() / len(ids)
    assert set(found) == set(block_linears(model)) and torch.allclose(found[name], want, rtol=1e-3, atol=1e-12)


def test_squeezellm_weighs_by_sensitivity_and_keeps_outliers() -> None:
    torch.manual_seed(0)
    weight, fisher = torch.randn(32, 256).bfloat16(), torch.rand(32, 256) ** 6
    fisher[3, 5] = 100
    method = SqueezeLLM(outliers=0.01, sensitive=0.001)
    made = method.encode(weight, fisher)
    got, plain = made.dequantize(), SqueezeLLM(outliers=0, sensitive=0).encode(weight, torch.ones_like(fisher)).dequantize()
    assert made.outliers is not None
    mask = torch.zeros(32, 256, dtype=torch.bool)
    mask[made.outliers.rows, made.outliers.columns.long()] = True
    assert torch.equal(got[mask], weight[mask]) and mask[3, 5]
    threshold = weight.float().abs().flatten().sort().values[-round(0.01 * weight.numel())]
    assert mask[weight.float().abs() > threshold].all()
    assert round(0.01 * weight.numel()) <= mask.sum() <= round(0.01 * weight.numel()) + round(0.001 * weight.numel())

    def loss(rounded: Tensor) -> float:
        return float((fisher * (rounded.float() - weight.float()).square()).sum())

    weighted = SqueezeLLM(outliers=0, sensitive=0).encode(weight, fisher)
    assert weighted.outliers is None and loss(weighted.dequantize()) < 0.9 * loss(plain) and loss(got) < loss(weighted.dequantize())


def test_squeezellm_stores_what_its_format_implies(dense: DenseModel, tmp_path: Path) -> None:
    claim, weights = run(SqueezeLLM(outliers=0.02), dense, tmp_path)
    kept = sum(len(w.outliers.columns) for w in weights.values() if w.outliers)
    bits = implied(weights, lambda o, i: 3 * o * i + o * 8 * 16 + 32 * (o + 1))
    bits += 48 * kept / sum(w.shape[0] * w.shape[1] for w in weights.values())
    assert claim.details["stored_bits"] == pytest.approx(bits, rel=1e-3)


def test_gobo_keeps_improbable_weights_and_shares_eight_centroids(dense: DenseModel, tmp_path: Path) -> None:
    claim, weights = run(GOBO(log_density=-1.0), dense, tmp_path)
    for name, weight in source(dense).items():
        x = weight.double()
        density = -((x - x.mean()) ** 2) / (2 * x.var()) - x.std().log() - 0.5 * torch.log(torch.tensor(2 * torch.pi))
        got, apart = weights[name].dequantize(), density < -1.0
        assert torch.equal(got[apart], weight[apart])
        assert len(got[~apart].unique()) <= 8
        found = weights[name].outliers
        assert (0 if found is None else len(found.columns)) == int(apart.sum())
        assert (got.double() - x)[~apart].abs().mean() < 0.25 * x.std()
    assert 0 < claim.details["outliers"] < 0.01


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_bcq_is_the_sum_of_its_signs_times_alphas(bits: Any, offset: bool) -> None:
    torch.manual_seed(0)
    weight, signs = torch.randn(8, 128).bfloat16(), torch.tensor([-1.0, 1.0]).bfloat16().view(1, 1, 2, 1)
    made = BCQ(bits=bits, group_size=32, offset=offset).encode(weight, signs)
    b, alphas = 2.0 * made.indices().double() - 1, made.scales
    assert alphas is not None and alphas.shape == (bits, 8, 4) and (made.offsets is not None) == offset
    want = sum((b[k].view(8, 4, 32) * alphas[k].double().unsqueeze(-1) for k in range(bits)), torch.zeros(8, 4, 32).double())
    want = want if made.offsets is None else want + made.offsets.double().unsqueeze(-1)
    assert torch.allclose(made.dequantize().double(), want.flatten(1), rtol=2**-7, atol=1e-6)
    patterns = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * bits).view(-1, bits)
    sums = torch.einsum("pk,kog->ogp", patterns, alphas.double())
    sums = sums if made.offsets is None else sums + made.offsets.double().unsqueeze(-1)
    best = (weight.double().view(8, 4, 32, 1) - sums.unsqueeze(2)).square().amin(-1).sum()
    assert (want.flatten(1) - weight.double()).square().sum() == pytest.approx(float(best), rel=1e-5)


def test_bcq_alternation_only_helps_and_one_bit_is_xnor_net() -> None:
    torch.manual_seed(0)
    weight, signs = torch.randn(16, 256).bfloat16(), torch.tensor([-1.0, 1.0]).bfloat16().view(1, 1, 2, 1)
    errors = [
        float((BCQ(rounds=rounds).encode(weight, signs).dequantize().double() - weight.double()).square().mean())
        for rounds in (0, 1, 5, 15)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.9 * errors[0]
    binary = BCQ(bits=1, group_size=None, rounds=0).encode(weight, signs).dequantize()
    assert torch.equal(
        binary, weight.float().sign().where(weight != 0, 1.0).bfloat16() * weight.float().abs().mean(1, keepdim=True).bfloat16()
    )


def test_mofq_takes_the_format_with_the_smaller_error(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny.save_model(tmp_path / "dense").load()
    for index, layer in enumerate(block_linears(model).values()):
        even, peaked = torch.rand(layer.weight.shape) - 0.5, torch.randn(layer.weight.shape) ** 3
        layer.weight.data = (even if index % 2 else peaked).to(layer.weight.dtype)
    model.save_pretrained(tmp_path / "dense")
    claim, weights = run(MoFQ(group_size=32), tiny.dense_model(tmp_path / "dense"), tmp_path)
    e2m1 = _levels.e2m1().bfloat16()
    for index, (name, weight) in enumerate(source(tiny.dense_model(tmp_path / "dense")).items()):
        groups, floating = weight.double().unflatten(1, (-1, 32)), torch.equal(weights[name].codebook.flatten(), e2m1)
        assert floating == (index % 2 == 0), name
        errors = []
        for levels, largest in ((torch.arange(-7, 8).double(), 7), (e2m1.double(), 6)):
            scale = (groups.abs().amax(-1, keepdim=True) / largest).bfloat16().double()
            errors.append((nearest(groups / scale, levels) * scale).square().mean())
        got = (weights[name].dequantize().double() - weight.double()).square().mean()
        assert float(got) == pytest.approx(float(min(errors)), rel=0.02)
    assert claim.details["layers"] == {"int4": 7, "fp4": 7}


def test_the_levels_of_mofq_lie_where_the_weights_do(dense: DenseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rounding(Exception):
        pass

    def rounding(self: MoFQ, weight: Tensor, to_codes: Any, largest: float, table: Tensor) -> None:
        raise Rounding(weight.device.type, table.device.type)

    monkeypatch.setattr(MoFQ, "round", rounding)
    with pytest.raises(Rounding) as found:
        MoFQ(group_size=32).compress(replace(dense, device="meta"), None, tmp_path)  # type: ignore[arg-type]
    assert found.value.args == ("meta", "meta")


def test_blockwise_equals_the_library(dense: DenseModel, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    _, weights = run(Blockwise8Bit(), dense, tmp_path)
    for name, weight in source(dense).items():
        codes, state = functional.quantize_blockwise(weight, blocksize=64)
        assert torch.equal(weights[name].indices().view_as(codes), codes)
        assert torch.equal(weights[name].dequantize(), functional.dequantize_blockwise(codes, state))


@pytest.mark.parametrize("normalise", ["rows", "columns"])
def test_vptq_entries_are_runs_of_outputs_and_feedback_helps(normalise: Any) -> None:
    torch.manual_seed(0)
    weight, mixing = torch.randn(32, 64) * torch.linspace(0.2, 3, 32)[:, None] + torch.linspace(-2, 2, 64), torch.randn(64, 64)
    weight = weight.bfloat16()
    moments = Moments.zeros(64, torch.device("cpu"))
    moments.add(torch.randn(500, 64) @ mixing * torch.linspace(0.1, 3, 64))
    method = VPTQ(vector=4, index_bits=6, normalise=normalise)
    made = method.encode(weight, moments)
    table, index, got = made.codebook[0, 0], made.indices()[0].long(), made.dequantize()
    assert index.shape == (8, 64) and table.shape == (64, 4)
    if normalise == "rows":
        scale, offset = weight.float().std(1, keepdim=True).bfloat16().float(), torch.zeros(1, 1)
    else:
        scale, offset = (weight.amax(0) - weight.amin(0)).float(), weight.amin(0).float()
    entries = table.float()[index].transpose(1, 2).flatten(0, 1)
    assert torch.equal(got, (entries * scale + offset).bfloat16())
    near = _kmeans.nearest_vectors(((weight.float() - offset) / scale).T.reshape(-1, 4), table.float())[0]
    to_nearest = table.float()[near].view(64, 32).T * scale + offset

    def output_error(approximation: torch.Tensor) -> torch.Tensor:
        change = approximation.float() - weight.float()
        return ((change @ moments.hessian) * change).sum()

    error = output_error(got)
    assert error < output_error(to_nearest)
    residual = VPTQ(vector=4, index_bits=6, tables=2, normalise=normalise).encode(weight, moments)
    assert output_error(residual.dequantize()) < 0.3 * error


def test_vptq_normalised_weights_do_not_depend_on_the_size_of_rows_or_columns() -> None:
    """What is divided away comes back exactly: powers of two on rows, or on columns with a shift, change the scales alone."""
    torch.manual_seed(0)
    weight = torch.randint(-8, 9, (32, 64)).bfloat16()
    moments = Moments.zeros(64, torch.device("cpu"))
    moments.add(torch.eye(64).repeat(4, 1))
    by_row, by_column = 2.0 ** torch.randint(-3, 4, (32, 1)), 2.0 ** torch.randint(-3, 4, (64,))
    weight[0] = 8 * (-1) ** torch.arange(64)
    weight[1] = -weight[0]  # so that all columns have one range
    rows, columns = (VPTQ(index_bits=6, normalise=kind, act_order=False, steps=5) for kind in ("rows", "columns"))
    even = moments.hessian.diagonal().expand_as(weight)
    for method, scaled in ((rows, weight * by_row.bfloat16()), (columns, weight * by_column.bfloat16())):
        (scale, offset), (other, shift) = method.norms(weight), method.norms(scaled)
        assert torch.equal((weight - offset) / scale, (scaled - shift) / other)
        table = method.learn((scaled.float() - shift.float()) / other.float(), even)
        assert torch.equal(table, method.learn((weight.float() - offset.float()) / scale.float(), even))


def test_vptq_carries_rows_of_very_different_size() -> None:
    """One table for rows that differ a hundredfold: without their scales the small ones are lost."""
    torch.manual_seed(0)
    weight = (torch.randn(64, 64) * torch.logspace(-2, 0, 64)[torch.randperm(64), None]).bfloat16()
    moments = Moments.zeros(64, torch.device("cpu"))
    moments.add(torch.randn(500, 64))
    rows, columns = (VPTQ(index_bits=8, normalise=kind).encode(weight, moments).dequantize() for kind in ("rows", "columns"))

    def relative(approximation: Tensor) -> Tensor:
        return ((approximation - weight).float().norm(dim=1) / weight.float().norm(dim=1)).median()

    assert relative(rows) < 0.5 < 0.6 < relative(columns)


def test_vptq_table_follows_the_cost() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64).bfloat16()
    cost = torch.where(torch.arange(64) < 8, 100.0, 0.01).expand_as(weight)
    table = VPTQ(index_bits=4).learn(weight, cost)[0]
    plain = VPTQ(index_bits=4).learn(weight, torch.ones(64, 64))[0]
    vectors = weight.float().T.reshape(64, -1, 4)[:8].flatten(0, 1)
    assert _kmeans.nearest_vectors(vectors, table)[1].sum() < 0.8 * _kmeans.nearest_vectors(vectors, plain)[1].sum()


@pytest.mark.parametrize(("normalise", "norms"), [("rows", lambda o, i: 16 * o), ("columns", lambda o, i: 2 * 16 * i)])
def test_vptq_stores_codes_tables_and_norms(dense: DenseModel, tmp_path: Path, normalise: Any, norms: Any) -> None:
    claim, weights = run(VPTQ(index_bits=6, tables=2, steps=5, normalise=normalise), dense, tmp_path)
    assert claim.bits == 3
    bits = implied(weights, lambda o, i: 3 * o * i + 2 * 64 * 4 * 16 + norms(o, i))
    assert claim.details["stored_bits"] == pytest.approx(bits, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KMeans(steps=0), "steps must be at least 1"),
        (lambda: SqueezeLLM(outliers=0.5), "fractions from 0 to below 0.1"),
        (lambda: BCQ(rounds=-1), "rounds must not be negative"),
        (lambda: VPTQ(dampening=0), "dampening must be positive"),
    ],
)
def test_wrong_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
