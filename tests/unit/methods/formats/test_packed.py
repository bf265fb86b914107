"""The packed format and its kernels, against float64 arithmetic written out here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from slimbench.harness.measure.hardware import hardware
from slimbench.methods.formats import packed
from slimbench.methods.kernels.base import Kernel
from slimbench.methods.kernels.cpu import build, library
from slimbench.methods.kernels.cpu.kernel import OwnCpu
from slimbench.methods.kernels.grid import Grid, LowRank, Outliers, QuantizedWeight, unpack
from slimbench.methods.kernels.packed_linear import KERNELS, PackedEmbedding, PackedLinear
from slimbench.methods.kernels.rounding import round_head
from slimbench.methods.kernels.torch.operators import Dequantize, Float8, Int4Pack, Int8Pack, IntMM
from slimbench.methods.quantization.weight.rtn import RTN
from tests.support import tiny
from tests.support.paths import ROOT

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card"))]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
W4, W4_WIDE, W8, W8A8 = Grid(4, 32), Grid(4, 128), Grid(8), Grid(8, None, 8)
E4M3, E4M3_INPUTS = Grid(8, None, None, "e4m3"), Grid(8, None, 8, "e4m3")
NARROW = [Grid(2, 32), Grid(2), Grid(3, 64), Grid(3), Grid(4), Grid(8, 64)]
OWN = "slimbench packed_mm"
SHAPES = [(48, 256), (100, 128), (1, 128), (33, 384)]
FALLBACK = "dequantize + matmul"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random_weight(grid: Grid, rows: int, columns: int, dtype: torch.dtype, offsets: bool = False, device: str = "cpu") -> QuantizedWeight:
    generator = torch.Generator().manual_seed(rows * columns)
    low, high = (-128, 128) if grid.bits == 8 else (0, 2**grid.bits)
    dtype_of_codes = torch.float8_e4m3fn if grid.number == "e4m3" else torch.int8 if grid.bits == 8 else torch.uint8
    codes = torch.randint(low, high, (rows, columns), generator=generator).to(dtype_of_codes)
    shape = (rows, columns // (grid.group_size or columns))
    scales = (torch.rand(shape, generator=generator) + 0.1).to(dtype)
    moved = torch.randn(shape, generator=generator).to(dtype) if offsets else None
    return QuantizedWeight(grid, codes.to(device), scales.to(device), None if moved is None else moved.to(device))


def exact(weight: QuantizedWeight) -> Tensor:
    """w = (q - mid) * scale + offset, column by column in float64."""
    codes, scales = weight.codes.double(), weight.scales.double()
    size = weight.grid.group_size or codes.shape[1]
    columns = []
    for i in range(codes.shape[1]):
        column = (codes[:, i] - {2: 2, 3: 4, 4: 8, 8: 0}[weight.grid.bits]) * scales[:, i // size]
        columns.append(column if weight.offsets is None else column + weight.offsets.double()[:, i // size])
    return torch.stack(columns, dim=1)


def rounded_inputs(x: Tensor, number: str = "int") -> Tensor:
    """Each row on 255 levels, or on e4m3 numbers, up to its largest magnitude; found in float32, so that ties fall alike."""
    rows = []
    for row in x.float():
        step = row.abs().max() / (127 if number == "int" else 448)
        levels = (row / step).round() if number == "int" else (row / step).to(torch.float8_e4m3fn)
        rows.append(levels.double() * step.double() if step > 0 else row.double())
    return torch.stack(rows) if rows else x.double()


def within_rounding(got: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether a result is the exact one up to its dtype: a few roundings of the result, the noise of rounded terms, and float32 sums.

    The noise is relative to the size that the sum would have with random signs, so cancellation does not count as error.
    """
    want = inputs @ weight.T + bias.double()
    noise = (inputs**2 @ weight.T**2 + bias.double() ** 2).sqrt()
    unit, sums = torch.finfo(got.dtype).eps / 2, inputs.shape[1] * 2**-24
    return bool(((got.double() - want).abs() <= unit * (3 * want.abs() + 8 * noise) + sums * noise).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("grid", "offsets"),
    [(W4, False), (W4, True), (W4_WIDE, True), (W8, False), (W8, True), (W8A8, False), (W8A8, True), (E4M3, False), (E4M3_INPUTS, False)]
    + [(grid, True) for grid in NARROW],
    ids=str,
)
def test_product_equals_float64(grid: Grid, offsets: bool, shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    weight = random_weight(grid, *shape, dtype, offsets, device)
    bias = torch.randn(shape[0], dtype=dtype, device=device)
    layer = PackedLinear(weight, bias)
    for rows in (0, 1, 3, 17, 40):
        x = torch.randn(rows, shape[1], device=device).to(dtype)
        inputs = rounded_inputs(x, grid.number) if grid.activation_bits else x.double()
        got = layer(x)
        assert got.dtype is dtype and got.shape == (rows, shape[0])
        assert within_rounding(got, inputs, exact(weight), bias), (rows, layer.kernel)
    assert layer(torch.randn(2, 5, shape[1], device=device).to(dtype)).shape == (2, 5, shape[0])


@pytest.mark.parametrize(
    ("grid", "shape", "dtype", "offsets", "kernel", "without_own"),
    [
        (W4, (48, 256), torch.bfloat16, False, OWN, "torch int4pack"),
        (W4, (48, 256), torch.bfloat16, True, OWN, "torch int4pack"),
        (W4, (100, 128), torch.bfloat16, False, OWN, FALLBACK),
        (W4, (48, 256), torch.float16, False, FALLBACK, FALLBACK),
        (W4, (48, 256), torch.float32, False, OWN, FALLBACK),
        (Grid(3, 32), (48, 256), torch.bfloat16, False, OWN, FALLBACK),
        (W8, (33, 384), torch.bfloat16, False, OWN, "torch int8pack"),
        (W8, (33, 380), torch.bfloat16, False, FALLBACK, FALLBACK),
        (W8, (33, 384), torch.bfloat16, True, OWN, FALLBACK),
        (W8, (33, 384), torch.float32, False, OWN, FALLBACK),
        (W8A8, (48, 256), torch.bfloat16, False, "torch int_mm w8a8", "torch int_mm w8a8"),
        (W8A8, (48, 256), torch.float32, False, "torch int_mm w8a8", "torch int_mm w8a8"),
        (W8A8, (33, 384), torch.bfloat16, False, FALLBACK, FALLBACK),
        (E4M3, (48, 256), torch.bfloat16, False, FALLBACK, FALLBACK),
        (E4M3_INPUTS, (48, 256), torch.bfloat16, False, FALLBACK, FALLBACK),
    ],
)
def test_kernel_on_cpu(
    grid: Grid, shape: tuple[int, int], dtype: torch.dtype, offsets: bool, kernel: str, without_own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random_weight(grid, *shape, dtype, offsets)
    layer = PackedLinear(weight)
    assert (layer.kernel, layer.kernel_missing) == (kernel, None)
    monkeypatch.setattr(OwnCpu, "missing", classmethod(lambda cls: "no compiler"))
    layer = PackedLinear(weight)
    assert layer.kernel == without_own
    assert layer.kernel_missing == (f"{OWN}: no compiler" if kernel == OWN else None)


@pytest.mark.parametrize("kernel", [Int4Pack, Int8Pack, IntMM, Dequantize], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("grid", [W4, W4_WIDE, Grid(4), W8, W8A8], ids=str)
def test_each_torch_operator_equals_float64(kernel: type[Kernel], grid: Grid) -> None:
    weight = random_weight(grid, 48, 256, torch.bfloat16)
    if not kernel.accepts(weight):
        with pytest.raises(ValueError, match="no kernel"):
            PackedLinear(weight, kernels=(kernel,))
        return
    layer, zero = PackedLinear(weight, kernels=(kernel,)), torch.zeros(48)
    for rows in (1, 3, 40):
        x = torch.randn(rows, 256).bfloat16()
        assert within_rounding(layer(x), rounded_inputs(x) if grid.activation_bits else x.double(), exact(weight), zero)
    assert torch.equal(layer.dequantize(), weight.dequantize())


@pytest.mark.parametrize("grid", [Grid(2, 32), Grid(3, 64), W4, Grid(8)], ids=str)
def test_one_large_input_does_not_drown_the_others(grid: Grid) -> None:
    weight = random_weight(grid, 48, 256, torch.bfloat16, offsets=True)
    x = torch.randn(5, 256).bfloat16()
    x[:, 7] = 3000
    assert within_rounding(PackedLinear(weight)(x), x.double(), exact(weight), torch.zeros(48))


def test_what_is_not_finite_is_passed_on_row_by_row() -> None:
    x = torch.randn(3, 256).bfloat16()
    x[0, 5], x[1, 6] = float("nan"), float("inf")
    y = PackedLinear(random_weight(W4, 48, 256, torch.bfloat16))(x)
    assert not y[0].isfinite().any() and not y[1].isfinite().any() and y[2].isfinite().all()


def test_the_operator_refuses_tensors_that_do_not_fit() -> None:
    assert build.missing() is None
    layer = PackedLinear(random_weight(W4, 48, 256, torch.bfloat16))
    with pytest.raises(RuntimeError, match="do not fit"):
        torch.ops.slimbench.packed_mm(torch.zeros(1, 128).bfloat16(), layer.weight_packed, layer.scales, None, 4, 48)
    with pytest.raises(RuntimeError, match="scales of the dtype of x"):
        torch.ops.slimbench.packed_mm(torch.zeros(1, 256), layer.weight_packed, layer.scales, None, 4, 48)


def test_products_of_the_same_inputs_become_one_call() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    from slimbench.methods.kernels.cpu.share import ShareInputs

    a, b, c = (PackedLinear(random_weight(grid, rows, 256, torch.bfloat16, True)) for grid, rows in ((W4, 48), (Grid(3, 64), 20), (W8, 16)))
    x = torch.randn(2, 3, 256).bfloat16()

    def model(x: Tensor) -> tuple[Tensor, ...]:
        first, second = a(x), b(x)
        return first, second, c(x + 1), c(x)

    traced = make_fx(model)(x)
    ShareInputs()(traced.graph)
    traced.recompile()
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.slimbench.packed_mm_shared.default) == 1
    assert called.count(torch.ops.slimbench.packed_mm.default) == 1
    for got, want in zip(traced(x), model(x), strict=True):
        assert torch.equal(got, want)


def test_a_compiler_that_fails_is_one_line_and_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    build.missing.cache_clear()
    monkeypatch.setenv("CXX", "false")
    try:
        assert build.missing() == "false could not build the CPU kernel: no message"
        monkeypatch.setattr(library, "compiler", lambda: pytest.fail("asked again"))
        assert "could not build" in (build.missing() or "")
    finally:
        build.missing.cache_clear()


@pytest.mark.parametrize("kernels", [KERNELS, (Dequantize,)], ids=["own", "expanded"])
def test_outliers_are_added_to_the_grid(kernels: tuple[type[Kernel], ...]) -> None:
    plain = random_weight(W4, 48, 256, torch.bfloat16)
    counts = torch.randint(0, 4, (48,))
    starts = torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
    outliers = Outliers(starts, torch.randint(0, 256, (int(starts[-1]),)).int(), torch.randn(int(starts[-1])).bfloat16() * 5)
    layer = PackedLinear(QuantizedWeight(plain.grid, plain.codes, plain.scales, None, outliers), kernels=kernels)
    want = exact(plain)
    for row in range(48):
        for at in range(int(starts[row]), int(starts[row + 1])):
            want[row, outliers.columns[at]] += outliers.values[at].double()
    for rows in (1, 9):
        x = torch.randn(rows, 256).bfloat16()
        assert within_rounding(layer(x), x.double(), want, torch.zeros(48))
    assert torch.allclose(layer.dequantize().double(), want, rtol=2**-7, atol=1e-6)


def low_rank_of(rows: int, columns: int, rank: int, dtype: torch.dtype) -> LowRank:
    return LowRank(torch.randn(rank, columns).to(dtype), (torch.randn(rows, rank) / rank).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kernels", [KERNELS, (Dequantize,)], ids=["own", "expanded"])
def test_a_low_rank_part_is_added_to_the_product(kernels: tuple[type[Kernel], ...], dtype: torch.dtype) -> None:
    plain, part = random_weight(W4, 48, 256, dtype, offsets=True), low_rank_of(48, 256, 5, dtype)
    bias = torch.randn(48, dtype=dtype)
    layer = PackedLinear(QuantizedWeight(plain.grid, plain.codes, plain.scales, plain.offsets, None, part), bias, kernels=kernels)
    added = part.expand.double() @ part.reduce.double()
    for rows in (1, 9):
        x = torch.randn(rows, 256).to(dtype)
        reduced = (x.double() @ part.reduce.double().T).abs() @ part.expand.double().abs().T
        slack = torch.finfo(dtype).eps * (reduced + 16 * exact(plain).norm(dim=1)) + 1e-5
        want = x.double() @ (exact(plain) + added).T + bias.double()
        assert ((layer(x).double() - want).abs() <= slack).all()
        assert ((PackedLinear(plain, bias, kernels=kernels)(x).double() - want).abs() > slack).any()
    assert torch.allclose(layer.dequantize().double(), exact(plain) + added, rtol=2**-7, atol=1e-5)


def test_a_low_rank_part_lies_on_disk_and_older_artefacts_load(tmp_path: Path) -> None:
    dense = tiny.save_model(tmp_path / "dense").load()
    weights = mixed_weights(dense, torch.bfloat16)
    name, plain = next(iter(weights.items()))
    part = low_rank_of(*plain.codes.shape, 3, torch.bfloat16)
    with_part = QuantizedWeight(plain.grid, plain.codes, plain.scales, plain.offsets, None, part)
    packed.save(dense, (weights | {name: with_part}).items(), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {key for key in stored if "low_rank" in key} == {f"{name}.low_rank_in", f"{name}.low_rank_out"}
    layer = packed.load(tmp_path).get_submodule(name)
    assert isinstance(layer, PackedLinear) and torch.equal(layer.dequantize(), with_part.dequantize())
    held = sum(t.untyped_storage().nbytes() for t in (*layer.buffers(), *layer.parameters()))
    bare = sum(t.untyped_storage().nbytes() for t in PackedLinear(plain).buffers())
    assert held == bare + 2 * 3 * sum(plain.codes.shape)
    packed.save(dense, weights.items(), tmp_path)
    described = json.loads((tmp_path / "packed.json").read_text())
    (tmp_path / "packed.json").write_text(json.dumps(described | {"schema": 2}))
    older = packed.load(tmp_path).get_submodule(name)
    assert isinstance(older, PackedLinear) and older.low_rank is None and torch.equal(older.dequantize(), plain.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_on_disk_and_back(bits: int) -> None:
    codes = random_weight(Grid(bits, 32), 5, 96, torch.float32).codes  # type: ignore[arg-type]
    stored = QuantizedWeight(Grid(bits, 32), codes, torch.ones(5, 3)).packed_codes()  # type: ignore[arg-type]
    assert stored.shape == (5, 96 * bits // 8) and torch.equal(unpack(stored, bits), codes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", [W4, W4_WIDE, W8, W8A8], ids=str)
@pytest.mark.parametrize("offsets", [False, True])
def test_dequantize_reads_back_what_was_packed(grid: Grid, dtype: torch.dtype, offsets: bool, device: str) -> None:
    weight = random_weight(grid, 48, 256, dtype, offsets, device)
    restored = PackedLinear(weight).dequantize()
    assert torch.equal(restored, weight.dequantize())
    ulp = torch.finfo(dtype).eps / 2 + 1e-7
    assert ((restored.double() - exact(weight)).abs() <= ulp * exact(weight).abs() + 1e-6).all()


def test_two_codes_share_a_byte_high_half_first() -> None:
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8).repeat(1, 8)
    weight = QuantizedWeight(W4, codes, torch.ones(1, 1))
    assert weight.packed_codes()[0, :2].tolist() == [0x12, 0xF0]
    assert torch.equal(unpack(weight.packed_codes(), 4), codes)


@pytest.mark.parametrize(
    ("grid", "bits"),
    [(Grid(2, 64), 2.25), (Grid(3, 64), 3.25), (W4, 4.5), (Grid(4), 4 + 16 / 256), (W8, 8 + 16 / 256), (W8A8, 8 + 32 / 256)],
    ids=str,
)
def test_layer_holds_only_packed_bytes(grid: Grid, bits: float) -> None:
    layer = PackedLinear(random_weight(grid, 64, 256, torch.bfloat16))
    layer(torch.randn(2, 256).bfloat16())
    layer.dequantize()
    held = sum(t.untyped_storage().nbytes() for t in (*layer.buffers(), *layer.parameters()))
    assert 8 * held / (64 * 256) == bits


def test_scaled_products_of_e4m3_numbers_equal_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel for cards on torch's CPU implementation of the same operator."""
    monkeypatch.setattr(Float8, "device", "cpu")
    weight = random_weight(E4M3_INPUTS, 48, 256, torch.bfloat16)
    assert Float8.accepts(weight) and not Float8.accepts(random_weight(E4M3_INPUTS, 33, 384, torch.bfloat16))
    monkeypatch.setattr(Float8, "missing", classmethod(lambda cls: None))
    bias = torch.randn(48).bfloat16()
    layer = PackedLinear(weight, bias)
    assert layer.kernel == Float8.name and torch.equal(layer.dequantize(), weight.dequantize())
    for rows in (0, 1, 3, 40):
        x = torch.randn(rows, 256).bfloat16()
        assert within_rounding(layer(x), rounded_inputs(x, "e4m3"), exact(weight), bias)


def test_int8_inputs_pass_nan_on_and_take_zero_rows() -> None:
    layer = PackedLinear(random_weight(W8A8, 16, 64, torch.bfloat16))
    x = torch.randn(3, 64).bfloat16()
    x[0, 5], x[1] = float("nan"), 0
    y = layer(x)
    assert y[0].isnan().all() and (y[1] == 0).all() and y[2].isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 32), "bits must be one of"),
        ((4, 48), "group_size must be one of"),
        ((8, 64, 8), "8-bit activations"),
        ((4, 32, 8), "8-bit activations"),
    ],
)
def test_grid_refuses_what_no_kernel_means(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(*arguments)  # type: ignore[arg-type]


def mixed_weights(model: nn.Module, dtype: torch.dtype) -> dict[str, QuantizedWeight]:
    """4 bits for attention, asymmetric for one layer; 8 bits, with and without 8-bit inputs, for the rest."""
    grids = {"q_proj": W4, "k_proj": W4, "v_proj": Grid(4, 64), "o_proj": W4, "gate_proj": W8, "up_proj": W8A8, "down_proj": W8}
    found = {}
    for name, layer in model.named_modules():
        if (leaf := name.rpartition(".")[2]) in grids:
            weight = random_weight(grids[leaf], *layer.weight.shape, dtype, offsets=leaf == "k_proj")
            moved = None if weight.offsets is None else weight.offsets * 0.01
            found[name] = QuantizedWeight(weight.grid, weight.codes, weight.scales * 0.02 / 2**weight.grid.bits, moved)
    return found


def _round_inputs(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    x = inputs[0]
    return (rounded_inputs(x.flatten(0, 1)).view_as(x).to(x.dtype),)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [{}, {"attention_bias": True, "tie_word_embeddings": False}], ids=["tied", "untied with bias"])
def test_saved_model_computes_as_one_with_dense_linears(tmp_path: Path, dtype: str, shape: dict[str, bool]) -> None:
    dense = tiny.save_model(tmp_path / "dense", dtype, **shape).load()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    weights = mixed_weights(dense, getattr(torch, dtype))
    out = tmp_path / "out"
    out.mkdir()
    packed.save(dense, iter(weights.items()), out)
    loaded = packed.load(out)

    for name, weight in weights.items():
        layer = loaded.get_submodule(name)
        assert isinstance(layer, PackedLinear) and layer.grid == weight.grid
        assert torch.equal(layer.dequantize(), weight.dequantize())
        dense.get_submodule(name).weight.data = weight.dequantize()
        if weight.grid.activation_bits:
            dense.get_submodule(name).register_forward_pre_hook(_round_inputs)
    ids = tiny.tokens(3, 50).ids
    with torch.inference_mode():
        want, got = dense(ids).logits.float(), loaded(ids).logits.float()
    assert not loaded.training and loaded.dtype is getattr(torch, dtype)
    assert (got - want).abs().max() < (0.02 if dtype == "bfloat16" else 1e-5) * want.abs().max()
    for name, tensor in dense.named_buffers():
        assert torch.equal(loaded.get_buffer(name), tensor)
    tied = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert tied is dense.config.tie_word_embeddings


def test_files_hold_no_dense_copy(tmp_path: Path) -> None:
    dense = tiny.save_model(tmp_path / "dense").load()
    weights = mixed_weights(dense, torch.bfloat16)
    packed.save(dense, weights.items(), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert "lm_head.weight" not in keys and "model.embed_tokens.weight" in keys
    assert not {f"{name}.weight" for name in weights} & keys
    assert {k for k in keys if k.endswith(".offsets")} == {f"{n}.offsets" for n in weights if n.endswith("k_proj")}
    described = json.loads((tmp_path / "packed.json").read_text())
    assert described["default"] == {"bits": 4, "group_size": 32, "activation_bits": None, "number": "int"}
    assert set(described["layers"]) == {n for n, w in weights.items() if w.grid != W4}


def test_load_refuses_newer_schema_and_wrong_tensors(tmp_path: Path) -> None:
    dense = tiny.save_model(tmp_path / "dense").load()
    packed.save(dense, mixed_weights(dense, torch.bfloat16).items(), tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"missing \['model.norm.weight'\]"):
        packed.load(tmp_path)
    save_file(tensors | {"model.norm.weight": norm, "stranger": norm.clone()}, weights)
    with pytest.raises(ValueError, match=r"left over \['stranger'\]"):
        packed.load(tmp_path)
    described = json.loads((tmp_path / "packed.json").read_text()) | {"schema": packed.SCHEMA + 1}
    (tmp_path / "packed.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="newer"):
        packed.load(tmp_path)


@pytest.mark.parametrize("head_bits", [4, 8])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_a_packed_head_takes_the_tied_embedding_along(
    tmp_path: Path, head_bits: Literal[4, 8], tied: bool, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = tiny.save_model(tmp_path / "dense", tie_word_embeddings=tied).load()
    ((name, weight),) = round_head(dense, head_bits)
    packed.save(dense, [(name, weight)], tmp_path)
    if not own:
        monkeypatch.setattr(OwnCpu, "missing", classmethod(lambda cls: "no compiler"))
    loaded = packed.load(tmp_path)
    assert name == "lm_head" and torch.equal(loaded.lm_head.dequantize(), weight.dequantize())
    assert isinstance(loaded.model.embed_tokens, PackedEmbedding) is tied
    dense.lm_head.weight.data = weight.dequantize()
    if tied:
        dense.model.embed_tokens.weight.data = weight.dequantize()
    ids = tiny.tokens(3, 50).ids
    assert torch.equal(loaded.model.embed_tokens(ids), dense.model.embed_tokens(ids))
    with torch.inference_mode():
        want, got = dense(ids).logits.float(), loaded(ids).logits.float()
    assert (got - want).abs().max() < 0.02 * want.abs().max()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("model.embed_tokens.weight" in file.keys()) is not tied  # noqa: SIM118 - it is no mapping


def test_the_last_token_of_a_prompt_copies_no_dense_head(tmp_path: Path) -> None:
    """torch's matmul copies the transposed weight of a sliced input unless the weight asks for gradients, as loaded dense ones do."""
    out = tmp_path / "out"
    out.mkdir()
    RTN(bits=4, group_size=32).compress(tiny.save_model(tmp_path / "dense", vocab_size=4096, tie_word_embeddings=False), None, out)
    model = packed.load(out)
    head, ids = model.lm_head.weight, torch.arange(32)[None]
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        model(ids, logits_to_keep=1)
    assert max(event.cpu_memory_usage for event in seen.events()) < head.nbytes


@pytest.mark.parametrize("offsets", [False, True], ids=["symmetric", "offsets"])
@pytest.mark.parametrize(
    ("kernel", "grid"),
    [(OwnCpu, W4), (Int4Pack, W4), (Int8Pack, W8), (IntMM, W8A8), (Dequantize, Grid(3, 64)), (Dequantize, W8)],
    ids=lambda value: value.name if isinstance(value, type) else str(value),
)
def test_a_few_rows_are_looked_up_without_the_others(kernel: type[Kernel], grid: Grid, offsets: bool) -> None:
    weight = random_weight(grid, 4096, 64, torch.bfloat16, offsets)
    if not kernel.accepts(weight) or kernel.missing():
        pytest.skip("no such weight")
    layer, index = PackedLinear(weight, kernels=(kernel,)), torch.tensor([4095, 0, 70, 70, 1])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        found = layer.rows(index)
    assert torch.equal(found, weight.dequantize()[index])
    assert max(event.cpu_memory_usage for event in seen.events()) < weight.codes.numel()
    many = torch.arange(4095, -1, -3)
    assert torch.equal(layer.rows(many), weight.dequantize()[many])


@pytest.mark.parametrize("rows", [3, 40, 1300])
def test_inputs_that_ask_for_gradients_give_the_same(rows: int) -> None:
    layer, x = PackedLinear(random_weight(W4, 48, 128, torch.bfloat16), kernels=(OwnCpu,)), torch.randn(rows, 128).bfloat16()
    assert torch.equal(layer(x.requires_grad_()).detach(), layer(x.detach()))


@pytest.mark.parametrize("rows", [3, 40, 1300])
def test_a_weight_of_no_outputs_gives_none(rows: int) -> None:
    codes, scales = torch.empty(0, 2, 8, 16, dtype=torch.int32), torch.empty(0, 2, 16, dtype=torch.bfloat16)
    assert build.missing() is None
    assert torch.ops.slimbench.packed_mm(torch.randn(rows, 128).bfloat16(), codes, scales, None, 4, 0).shape == (rows, 0)


def test_very_many_rows_are_multiplied_by_the_library_where_there_are_tiles() -> None:
    layer = PackedLinear(random_weight(W4, 48, 128, torch.bfloat16), kernels=(OwnCpu,))
    used = {}
    for rows in (40, 1279, 1280):
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            layer(torch.randn(rows, 128).bfloat16())
        used[rows] = any(event.name == "aten::mm" for event in seen.events())
    tiles = torch.ops.slimbench.packed_mm_instructions().startswith("tiles")
    assert used == {40: False, 1279: False, 1280: tiles}


def test_prompts_go_through_tiles_where_the_processor_gains_by_them() -> None:
    here = hardware()
    assert build.missing() is None
    if {"avx512_bf16", "avx512_vnni"} <= set(here.cpu_flags) and "amx_bf16" not in here.cpu_flags:
        assert torch.ops.slimbench.packed_mm_instructions() == ("tiles by AVX-512 / VNNI" if "AMD" in here.cpu else "VNNI")


_OTHER = """
import sys, torch
sys.path.append(sys.argv.pop(1))
from slimbench.methods.kernels.cpu import build, library
library.FLAGS = (*library.FLAGS, *sys.argv[1:])
assert build.missing() is None, build.missing()
from slimbench.methods.kernels.cpu.kernel import OwnCpu
from slimbench.methods.kernels.grid import Grid
from slimbench.methods.kernels.packed_linear import PackedLinear
from tests.unit.methods.formats.test_packed import exact, random_weight
for bits in (2, 3, 4, 8):
    shapes = [(32, (37, 96)), (64, (80, 192)), (128, (130, 256)), (None, (65, 160)), (64, (50, 2048))]
    if bits == 3:
        shapes.append((64, (1100, 2048)))  # so large that it is taken apart
    for group, (rows, columns) in shapes:
        for dtype in (torch.bfloat16, torch.float32):
            for offsets in (False, True):
                weight = random_weight(Grid(bits, group), rows, columns, dtype, offsets)
                layer, wanted = PackedLinear(weight, kernels=(OwnCpu,)), exact(weight)
                for many in (1, 3, 12, 40, 64, 530, 1300):
                    x = torch.randn(many, columns).to(dtype)
                    got, want = layer(x).double(), x.double() @ wanted.T
                    error = (got - want).abs() / (x.double().abs() @ wanted.abs().T)
                    assert error.max() < (2**-8 if dtype is torch.bfloat16 else 1e-5), (bits, group, dtype, offsets, many, error.max())
"""


@pytest.mark.parametrize(
    "flags",
    [
        [],
        *(
            pytest.param(flags, marks=pytest.mark.full)
            for flags in (
                ["-DSLIMBENCH_TILES_ANYWHERE", "-mno-amx-bf16"],
                ["-mno-avx512vnni"],
                ["-mno-avx512f"],
                ["-mno-avx512f", "-mno-avx2"],
            )
        ),
    ],
    ids=["this processor", "tiles without AMX", "avx512 without vnni", "avx2", "any processor"],
)
def test_every_instruction_set_computes_the_same(flags: list[str]) -> None:
    """Tiles without AMX need a processor with bfloat16 products of 512 bits; elsewhere the test is of what there is."""
    subprocess.run([sys.executable, "-P", "-c", _OTHER, str(ROOT), *flags], check=True)
