"""The bitmap format and its kernel, against bits, places and products written out here."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure import claims
from slimbench.methods.base import EDITED, Calibration, Claim, DenseModel, Unsupported
from slimbench.methods.formats import bitmap, edited, policy
from slimbench.methods.formats.huggingface import save_dense
from slimbench.methods.kernels import bitmap_linear
from slimbench.methods.kernels.bitmap_linear import BitmapLinear, BitmapWeight, TwoOfFourWeight, nbytes, smallest
from slimbench.methods.kernels.cpu import sparse
from slimbench.methods.pruning.storage.bitmap import Bitmap
from slimbench.methods.quantization.cache.kv_cache import KVInt
from tests.support import tiny
from tests.support.architectures import make
from tests.unit.methods.formats.test_edited import cut_channels, cut_heads

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(48, 256), (37, 100), (5, 7), (1, 64), (600, 72), (3, 1000)]
ROWS = (0, 1, 2, 3, 7, 8, 9, 40)
NONE = Calibration.none()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pruned(outputs: int, inputs: int, zeros: float, dtype: torch.dtype) -> Tensor:
    """A weight whose first row is empty and whose last one is full, where there is more than one."""
    weight = torch.randn(outputs, inputs).to(dtype) * (torch.rand(outputs, inputs) >= zeros)
    if outputs > 1:
        weight[0], weight[-1] = 0, torch.rand(inputs).to(dtype) + 1
    return weight


def two_of_four(outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    """A weight with two weights in each run of four, in all six places, and one or none in some."""
    places = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    weight = torch.zeros(outputs, inputs)
    for o in range(outputs):
        for run in range(inputs // 4):
            for at in places[(o + run) % 6]:
                weight[o, 4 * run + at] = 1 + torch.rand(())
    weight[0, :8] = torch.tensor([0, 0, 0, 3, 0, 0, 0, 0])
    return weight.to(dtype)


def read_bitmap(parts: dict[str, Tensor], inputs: int) -> list[list[float]]:
    """The specification: bit i % 8 of byte i // 8; stored weights one after the other, those of a row from its start on."""
    rows = []
    for o, stored in enumerate(parts["bits"].tolist()):
        at, row = int(parts["starts"][o]), []
        for i in range(inputs):
            there = stored[i // 8] >> i % 8 & 1
            row.append(float(parts["values"][at]) if there else 0.0)
            at += there
        assert at == int(parts["starts"][o + 1])
        rows.append(row)
    return rows


def read_two_of_four(parts: dict[str, Tensor]) -> list[list[float]]:
    """The specification: four bits a run, the lower ones of a byte first; two of them for the place of each of two weights."""
    rows = []
    for stored, values in zip(parts["places"].tolist(), parts["values"].tolist(), strict=True):
        row = [0.0] * (2 * len(values))
        for run in range(len(values) // 2):
            nibble = stored[run // 2] >> 4 * (run % 2) & 15
            assert nibble & 3 < nibble >> 2
            row[4 * run + (nibble & 3)] += values[2 * run]
            row[4 * run + (nibble >> 2)] += values[2 * run + 1]
        rows.append(row)
    return rows


def within_rounding(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether a product is the exact one up to the rounding of its dtype, twice, and float32 sums."""
    want = x.double() @ weight.double().T + bias.double()
    size = (x.double() ** 2 @ weight.double().T ** 2 + bias.double() ** 2).sqrt()
    unit = torch.finfo(got.dtype).eps / 2
    return bool(((got.double() - want).abs() <= unit * (3 * want.abs() + 2 * size) + x.shape[1] * 2**-24 * size + 1e-30).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_bitmap_is_what_it_says_and_comes_back_bit_by_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = pruned(*shape, 0.6, dtype)
    stored = BitmapWeight.of(weight)
    stored.check()
    assert torch.equal(torch.tensor(read_bitmap(stored.parts(), shape[1])), weight.float())
    assert torch.equal(stored.dense(), weight) and len(stored.values) == int(weight.count_nonzero())
    assert nbytes(stored) == shape[0] * -(-shape[1] // 8) + 4 * (shape[0] + 1) + weight.element_size() * int(weight.count_nonzero())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(12, 64), (7, 36), (1, 4), (13, 128)], ids=str)
def test_two_of_four_is_what_it_says_and_comes_back_bit_by_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = two_of_four(shape[0], max(shape[1], 8), dtype)[:, : shape[1]]
    stored = TwoOfFourWeight.of(weight)
    assert stored is not None
    stored.check()
    assert torch.equal(torch.tensor(read_two_of_four(stored.parts())), weight.float())
    in_memory = stored.bitmap()
    in_memory.check()
    assert torch.equal(in_memory.dense(), weight) and len(in_memory.values) == weight.numel() // 2
    assert TwoOfFourWeight.of(torch.ones_like(weight)) is None and TwoOfFourWeight.of(weight[:, :-1]) is None


def test_the_bytes_are_those_of_the_formula_and_the_smallest_form_is_taken() -> None:
    for zeros, share in ((0.5, 0.5625), (0.6, 0.4625), (0.7, 0.3625), (0.9, 0.1625)):
        kept = round((1 - zeros) * 640)
        weight = torch.ones(640, 640).bfloat16() * (torch.rand(640, 640).argsort(1) < kept)
        form = smallest(weight)
        assert isinstance(form, BitmapWeight) and nbytes(form) - 4 * 641 == pytest.approx(share * weight.nbytes)
    semi = two_of_four(64, 640, torch.bfloat16)
    form = smallest(semi)
    assert isinstance(form, TwoOfFourWeight) and nbytes(form) == 0.5625 * semi.nbytes
    assert isinstance(smallest(semi * (torch.rand(64, 640) < 0.5)), BitmapWeight), "sparser than its pattern"
    full = torch.ones(64, 64).bfloat16()
    assert smallest(full) is None
    full[:, :4] = 0
    assert smallest(full) is None, "as many bytes for bits as are saved"
    full[:, :8] = 0
    assert isinstance(smallest(full), BitmapWeight)


def test_a_zero_has_no_sign_afterwards() -> None:
    weight = torch.tensor([[-0.0, 1.0, -1.0, 0.0]])
    assert torch.equal(BitmapWeight.of(weight).values, torch.tensor([1.0, -1.0]))
    assert not BitmapWeight.of(weight).dense().signbit()[0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9, 1.0])
def test_a_product_equals_float64(zeros: float, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, bias = pruned(*shape, zeros, dtype), torch.randn(shape[0]).to(dtype)
    layer = BitmapLinear(BitmapWeight.of(weight), bias)
    assert layer.kernel == ("expand + matmul" if dtype is torch.float16 else "slimbench sparse_mm") and layer.kernel_missing is None
    for rows in ROWS:
        x = torch.randn(rows, shape[1]).to(dtype)
        got = layer(x)
        assert got.dtype is dtype and got.shape == (rows, shape[0])
        assert within_rounding(got, x, weight, bias), rows
        assert within_rounding(BitmapLinear(BitmapWeight.of(weight))(x), x, weight, torch.zeros(shape[0])), rows
    assert layer(torch.randn(2, 5, shape[1]).to(dtype)).shape == (2, 5, shape[0])
    assert torch.equal(layer.dequantize(), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_each_weight_meets_its_own_input(dtype: torch.dtype) -> None:
    """Powers of two: every sum is exact, and no two sets of inputs have the same."""
    weight = pruned(64, 136, 0.5, torch.float32).bool().to(dtype)
    layer = BitmapLinear(BitmapWeight.of(weight))
    for first in range(0, 136, 8):
        x = torch.zeros(1, 136)
        x[0, first : first + 8] = 2.0 ** torch.arange(8)
        assert torch.equal(layer(x.to(dtype)).float(), x @ weight.float().T)


def test_layers_hold_no_more_than_lies_on_disk() -> None:
    for form in (smallest(pruned(64, 256, 0.7, torch.bfloat16)), two_of_four(64, 256, torch.bfloat16)):
        stored = form if isinstance(form, BitmapWeight) else TwoOfFourWeight.of(form)  # type: ignore[arg-type]
        assert stored is not None
        layer = BitmapLinear(stored if isinstance(stored, BitmapWeight) else stored.bitmap())
        layer(torch.randn(1, 256).bfloat16())
        held = sum(t.untyped_storage().nbytes() for t in layer.buffers())
        assert held == nbytes(stored) + (0 if isinstance(stored, BitmapWeight) else 4 * 65)


def test_the_operator_refuses_tensors_that_do_not_fit_and_can_be_traced() -> None:
    layer = BitmapLinear(BitmapWeight.of(pruned(48, 100, 0.5, torch.float32)))
    arguments = torch.randn(2, 100), layer.bits, layer.starts, layer.values
    torch.library.opcheck(torch.ops.slimbench.sparse_mm.default, arguments, test_utils=("test_schema", "test_faketensor"))
    for wrong, match in (((torch.zeros(1, 90), *arguments[1:]), "do not fit"), ((arguments[0].bfloat16(), *arguments[1:]), "dtype of x")):
        with pytest.raises(RuntimeError, match=match):
            torch.ops.slimbench.sparse_mm(*wrong)


def test_without_a_compiler_weights_are_expanded_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse.missing.cache_clear()
    monkeypatch.setenv("CXX", "false")
    try:
        layer = BitmapLinear(BitmapWeight.of(pruned(48, 100, 0.5, torch.bfloat16)), torch.ones(48).bfloat16())
        assert layer.kernel == bitmap_linear.EXPANDED
        assert layer.kernel_missing == "slimbench sparse_mm: false could not build the CPU kernel: no message"
        x = torch.randn(3, 100).bfloat16()
        assert within_rounding(layer(x), x, layer.dequantize(), torch.ones(48))
    finally:
        sparse.missing.cache_clear()


_OTHER = """
import ctypes, mmap, sys, torch
from slimbench.methods.kernels.cpu import library, sparse
library.FLAGS = (*library.FLAGS, *sys.argv[1:])
assert sparse.missing() is None, sparse.missing()
from slimbench.methods.kernels.bitmap_linear import BitmapLinear, BitmapWeight
for dtype in (torch.bfloat16, torch.float32):
    weight = (torch.randn(37, 100) * (torch.rand(37, 100) < 0.5)).to(dtype)
    for rows in (1, 3, 20):
        x = torch.randn(rows, 100).to(dtype)
        got, want = BitmapLinear(BitmapWeight.of(weight))(x).double(), x.double() @ weight.double().T
        assert (got - want).abs().max() < (0.1 if dtype is torch.bfloat16 else 1e-4)
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 2 * page)
begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(begin + page), page, 0) == 0
for dtype in (torch.bfloat16, torch.float32):
    weight = BitmapWeight.of((torch.randn(9, 100) * (torch.rand(9, 100) < 0.5)).to(dtype))
    values = torch.frombuffer(memory, dtype=dtype, count=len(weight.values), offset=page - weight.values.nbytes)
    values.copy_(weight.values)
    layer = BitmapLinear(BitmapWeight(weight.bits, weight.starts, values, 100))
    for rows in (1, 20):
        assert layer(torch.ones(rows, 100, dtype=dtype)).isfinite().all()
"""


@pytest.mark.parametrize(
    "flags",
    [[], *(pytest.param(flags, marks=pytest.mark.full) for flags in (["-mno-avx512f"], ["-mno-avx512f", "-mno-avx2"]))],
    ids=["this processor", "avx2", "any processor"],
)
def test_other_processors_compute_the_same_and_none_reads_behind_the_end(flags: list[str]) -> None:
    subprocess.run([sys.executable, "-P", "-c", _OTHER, *flags], check=True)


# ------------------------------------------------------------------------------------------------------------------- the artefact


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    folder = tmp_path_factory.mktemp("models")
    return tiny.sparse(tiny.save_model(folder / "dense"), folder / "sparse")


def run(dense: DenseModel, out: Path, method: Bitmap | None = None) -> tuple[Claim, Any]:
    out.mkdir(exist_ok=True)
    return (method or Bitmap()).compress(dense, NONE, out), bitmap.load(out)


def test_the_artefact_holds_the_same_weights_in_the_bytes_that_are_claimed(dense: DenseModel, tmp_path: Path) -> None:
    shares: list[float] = []
    claim, loaded = run(dataclasses.replace(dense, progress=lambda done, total: shares.append(done / total)), tmp_path / "one")
    source, stored = dense.load(), load_file(tmp_path / "one" / "model.safetensors")
    layers = {name: layer for name, layer in loaded.named_modules() if isinstance(layer, BitmapLinear)}
    assert layers.keys() == tiny.block_layers(source).keys() and shares[-1] == 1
    for name, layer in layers.items():
        assert torch.equal(layer.dequantize(), source.get_parameter(f"{name}.weight"))
    zeros, weights = (
        sum(int(f(layer.weight)) for layer in tiny.block_layers(source).values()) for f in (lambda w: (w == 0).sum(), torch.numel)
    )
    taken = sum(tensor.nbytes for key, tensor in stored.items() if key.rpartition(".")[0] in layers)
    assert (claim.format, claim.sparsity, claim.bits, claim.pattern) == ("bitmap", zeros / weights, None, None)
    assert claim.details == {"stored_bytes": taken, "of_dense_bytes": round(taken / (2 * weights), 4), "dense_layers": 0}
    found = claims.check(TransformersModel(loaded, "cpu"), claim, taken)
    assert not found.flags and found.kernel == "slimbench::sparse_mm" and found.sparsity == claim.sparsity
    linear = next(layer for layer in found.layers if layer.role == "linear")
    assert linear.bytes == taken and linear.layer == "BitmapLinear"
    ids = tiny.tokens(2, 12).ids
    torch.testing.assert_close(loaded(ids).logits, source(ids).logits, rtol=0.05, atol=0.05)
    again, _ = run(dense, tmp_path / "two")
    assert again == claim
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == (tmp_path / "one" / "model.safetensors").read_bytes()


def test_a_pattern_keeps_two_values_and_their_places(tmp_path: Path) -> None:
    source = tiny.save_model(tmp_path / "dense", "float32").load()
    with torch.no_grad():
        for layer in tiny.block_layers(source).values():
            runs = layer.weight.unflatten(1, (-1, 4))
            runs.scatter_(-1, runs.abs().argsort(-1)[..., :2], 0)
    dense = tiny.saved(source, tmp_path / "pruned")
    claim, loaded = run(dense, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {key.rpartition(".")[2] for key in stored if "self_attn" in key} == {"places", "values"}
    assert claim.details["of_dense_bytes"] == 0.5312 and claim.sparsity == 0.5
    assert torch.equal(loaded.get_submodule("model.layers.1.mlp.down_proj").dequantize(), source.model.layers[1].mlp.down_proj.weight)
    found = claims.check(TransformersModel(loaded, "cpu"), dataclasses.replace(claim, pattern="2:4"), 0)
    assert not found.flags, "a kernel for sparse weights ran"


def test_layers_without_enough_zeros_stay_dense_and_a_model_without_is_refused(dense: DenseModel, tmp_path: Path) -> None:
    plain = tiny.save_model(tmp_path / "plain")
    with pytest.raises(
        Unsupported, match=r"no layer has enough zeros to be smaller without them: 0\.\d% of the weights are zero"
    ) as refusal:
        run(plain, tmp_path / "refused")
    assert "\n" not in str(refusal.value) and not list((tmp_path / "refused").iterdir())
    model = plain.load()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, :8] = 0
        model.model.layers[1].mlp.up_proj.weight[:, :3] = 0
    model.save_pretrained(tmp_path / "few")
    claim, loaded = run(tiny.dense_model(tmp_path / "few"), tmp_path / "out")
    assert [name for name, layer in loaded.named_modules() if isinstance(layer, BitmapLinear)] == ["model.layers.0.mlp.up_proj"]
    assert claim.details["dense_layers"] == 13 and 0.99 < claim.details["of_dense_bytes"] < 1
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)


def test_biases_and_other_blocks_are_kept(tmp_path: Path) -> None:
    make("opt", torch.bfloat16).save_pretrained(tmp_path / "opt")
    dense = tiny.sparse(tiny.dense_model(tmp_path / "opt"), tmp_path / "sparse")
    _, loaded = run(dense, tmp_path / "out")
    source, ids = dense.load(), tiny.tokens(2, 12).ids
    assert torch.equal(loaded.model.decoder.layers[0].fc1.bias, source.model.decoder.layers[0].fc1.bias)
    torch.testing.assert_close(loaded(ids).logits, source(ids).logits, rtol=0.05, atol=0.1)
    make("mixtral", torch.bfloat16).save_pretrained(tmp_path / "mixtral")
    with pytest.raises(Unsupported, match="4 experts in one tensor"):
        run(tiny.dense_model(tmp_path / "mixtral"), tmp_path / "experts")


def test_an_edited_base_keeps_its_edits(tmp_path: Path) -> None:
    model = make("llama", torch.bfloat16, head_dim=32)
    cut_heads(model)
    cut_channels(model)
    (tmp_path / "edited").mkdir()
    save_dense(model, tmp_path / "edited")
    base = dataclasses.replace(tiny.dense_model(tmp_path / "edited"), format=EDITED, shape=edited.shape_of(tmp_path / "edited"))
    dense = tiny.sparse(base, tmp_path / "sparse")
    _, loaded = run(dense, tmp_path / "out")
    source, ids = dense.load(), tiny.tokens(2, 12).ids
    layers = {name: layer for name, layer in loaded.named_modules() if isinstance(layer, BitmapLinear)}
    assert len({layer.out_features for name, layer in layers.items() if name.endswith("up_proj")}) > 1
    assert all(torch.equal(layer.dequantize(), source.get_parameter(f"{name}.weight")) for name, layer in layers.items())
    torch.testing.assert_close(loaded(ids).logits, source(ids).logits, rtol=0.05, atol=0.05)
    assert Bitmap.produces_after(EDITED) == "bitmap"


def test_a_cache_of_few_bits_sits_on_it(dense: DenseModel, tmp_path: Path) -> None:
    _, loaded = run(dense, tmp_path / "base")
    on = dataclasses.replace(dense, path=tmp_path / "base", format="bitmap")
    (tmp_path / "out").mkdir()
    KVInt(bits=8).compress(on, NONE, tmp_path / "out")
    with_cache, ids = policy.load(tmp_path / "out"), tiny.tokens(2, 12).ids
    torch.testing.assert_close(with_cache(ids).logits, loaded(ids).logits, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("part", "spoil", "message"),
    [
        ("bits", lambda t: t ^ 1, "do not fit each other"),
        ("bits", lambda t: t[:, 1:], "do not fit each other"),
        ("starts", lambda t: t.flip(0), "do not fit each other"),
        ("starts", lambda t: t + 1, "do not fit each other"),
        ("values", lambda t: t[1:], "stored weights in place of"),
        ("starts", None, r"\['bits', 'values'\] in place of"),
        ("values", None, "missing"),
    ],
)
def test_parts_that_do_not_fit_are_refused_in_one_line(part: str, spoil: Any, message: str, dense: DenseModel, tmp_path: Path) -> None:
    run(dense, tmp_path)
    file, key = tmp_path / "model.safetensors", f"model.layers.1.mlp.up_proj.{part}"
    tensors = load_file(file)
    tensor = tensors.pop(key)
    if spoil:
        tensors[key] = spoil(tensor).contiguous()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=message) as refusal:
        bitmap.load(tmp_path)
    assert "\n" not in str(refusal.value)


def test_places_that_no_run_has_are_refused_and_so_is_a_newer_schema(dense: DenseModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two in order"):
        TwoOfFourWeight(torch.zeros(1, 1, dtype=torch.uint8), torch.ones(1, 4)).check()
    with pytest.raises(ValueError, match="do not fit stored weights"):
        TwoOfFourWeight(torch.zeros(1, 2, dtype=torch.uint8), torch.ones(1, 4)).check()
    run(dense, tmp_path)
    described = json.loads((tmp_path / "bitmap.json").read_text())
    (tmp_path / "bitmap.json").write_text(json.dumps(described | {"schema": bitmap.SCHEMA + 1}))
    with pytest.raises(ValueError, match="schema 2 is newer than 1"):
        bitmap.load(tmp_path)
