"""The Triton kernels in Triton's interpreter, on CPU tensors, against float64 arithmetic; and that they compile for real cards."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.methods.kernels.grid import BITS, GROUP_SIZES, Grid, Outliers, QuantizedWeight
from slimbench.methods.kernels.packed_linear import KERNELS, PackedLinear
from slimbench.methods.kernels.torch.operators import Dequantize
from slimbench.methods.kernels.triton import layout
from slimbench.methods.kernels.triton.kernel import OwnTriton
from slimbench.methods.kernels.triton.sparse_kernel import MOST_ROWS, OwnSparse
from tests.support.paths import ROOT

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
MODULES = ("slimbench.methods.kernels.triton.packed_mm", "slimbench.methods.kernels.triton.sparse24")


def random_weight(
    bits: int, group: int | None, shape: tuple[int, int], dtype: torch.dtype, offsets: bool = False, device: str = "cpu"
) -> QuantizedWeight:
    """Codes over the whole range, with scales that differ from group to group."""
    generator = torch.Generator().manual_seed(bits * 1000 + shape[0])
    low = -128 if bits == 8 else 0
    codes = torch.randint(low, low + 2**bits, shape, generator=generator).to(torch.int8 if bits == 8 else torch.uint8)
    steps = (shape[0], shape[1] // (group or shape[1]))
    scales = (torch.rand(steps, generator=generator) + 0.1).to(dtype)
    moved = torch.randn(steps, generator=generator).to(dtype).to(device) if offsets else None
    grid = Grid(bits, group)  # type: ignore[arg-type]
    return QuantizedWeight(grid, codes.to(device), scales.to(device), moved)


def exact(weight: QuantizedWeight) -> Tensor:
    """w = (q - mid) * scale + offset in float64."""
    size = weight.codes.shape[1] // weight.scales.shape[1]
    middle = {2: 2, 3: 4, 4: 8, 8: 0}[weight.grid.bits]
    spread = weight.scales.double().repeat_interleave(size, dim=1)
    found = (weight.codes.double() - middle) * spread
    return found if weight.offsets is None else found + weight.offsets.double().repeat_interleave(size, dim=1)


def error(y: Tensor, x: Tensor, weight: Tensor) -> float:
    """Largest deviation from the exact product, in units of what rounding does: the result and each term once, float32 sums.

    A term's rounding counts with the size that the sum would have with random signs, so cancellation does not count as error.
    """
    want, noise = x.double() @ weight.T, (x.double() ** 2 @ weight.T**2).sqrt()
    unit = torch.finfo(y.dtype).eps / 2
    allowed = unit * (want.abs() + 4 * noise) + x.shape[1] * 2**-24 * noise
    return float(((y.double() - want).abs() / allowed.clamp_min(1e-30)).max()) if y.numel() else 0.0


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    """Kernels defined now are interpreted; those that later tests in this process import are not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for module in MODULES:
            patch.delitem(sys.modules, module, raising=False)
        yield
    for module in MODULES:
        sys.modules.pop(module, None)


@pytest.mark.parametrize("bits", BITS)
def test_layout_reads_back(bits: int) -> None:
    weight = random_weight(bits, 32, (70, 96), torch.float16, offsets=True)
    words = layout.pack(weight.codes, bits)
    assert words.shape == (3, 3, 32 * bits) and words.dtype is torch.int32
    assert torch.equal(layout.unpack(words, bits)[:70], weight.codes)
    assert torch.equal(layout.unpack_steps(layout.pack_steps(weight.scales))[:70], weight.scales)


def test_layout_is_as_documented() -> None:
    codes = torch.zeros(64, 64, dtype=torch.uint8)
    codes[32 + 8 * 2 + 5, 32 + 8 * 3 + 2 * 1 + 1] = 9  # tile 1, r = 2, g = 5; unit 1, word 3, pair 1, upper half
    words = layout.pack(codes, 4)
    assert words.nonzero().tolist() == [[1, 1, (5 * 4 + 3) * 4 + 2]]
    assert words[1, 1, 94] == 9 << 4 * 1 + 16


@needs_triton
@pytest.mark.parametrize("rows", [2, 17], ids="rows{}".format)
@pytest.mark.parametrize(("bits", "group"), list(product(BITS, (*GROUP_SIZES, None))), ids=str)
@pytest.mark.parametrize("offsets", [False, True], ids=["symmetric", "offsets"])
def test_product_equals_float64(bits: int, group: int | None, offsets: bool, rows: int) -> None:
    torch.manual_seed(rows)
    shape = (33, 2 * (group or 48))
    weight = random_weight(bits, group, shape, torch.float32, offsets)
    layer = PackedLinear(weight, kernels=(OwnTriton,))
    x = torch.randn(rows, shape[1])
    y = layer(x)
    assert y.shape == (rows, 33) and error(y, x, exact(weight)) < 1


@needs_triton
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5])
@pytest.mark.parametrize("outputs", [1, 32, 100])
def test_odd_shapes_in_float16(outputs: int, rows: int) -> None:
    weight = random_weight(4, 32, (outputs, 160), torch.float16, offsets=True)
    layer = PackedLinear(weight, torch.randn(outputs).half(), kernels=(OwnTriton,))
    x = torch.randn(rows, 160).half()
    y = layer(x)
    assert y.dtype is torch.float16 and y.shape == (rows, outputs)
    augmented = torch.cat([exact(weight), layer.bias.double()[:, None]], dim=1)
    assert error(y, torch.cat([x, torch.ones(rows, 1).half()], dim=1), augmented) < 2  # the bias is added to a rounded product


@needs_triton
def test_few_rows_in_bfloat16() -> None:
    weight = random_weight(3, 64, (40, 128), torch.bfloat16, offsets=True)
    x = torch.randn(4, 128).bfloat16()
    assert error(PackedLinear(weight, kernels=(OwnTriton,))(x), x, exact(weight)) < 1


@needs_triton
def test_operator_keeps_to_its_schema_and_shape() -> None:
    layer = PackedLinear(random_weight(4, 32, (33, 64), torch.float32), kernels=(OwnTriton,))
    arguments = (torch.randn(2, 64), layer.weight_packed, layer.scales, None, 4, 33)
    torch.library.opcheck(torch.ops.slimbench.triton_packed_mm.default, arguments, test_utils=("test_schema", "test_faketensor"))


@needs_triton
def test_rows_that_are_not_there_are_not_written() -> None:
    from slimbench.methods.kernels.triton.packed_mm import product as multiply

    weight = random_weight(4, 32, (33, 64), torch.float32)
    kept = layout.prepare(weight)
    for rows in (3, 17):
        guarded = torch.full((rows + 2, 64), float("nan"))
        guarded[1:-1] = torch.randn(rows, 64)
        x = guarded[1:-1]
        y = multiply(x, kept["weight_packed"], kept["scales"], None, 4, 33)
        assert error(y, x, exact(weight)) < 1


@needs_triton
@pytest.mark.parametrize("bits", BITS)
def test_layer_reads_back_its_weight(bits: int) -> None:
    weight = random_weight(bits, 32, (70, 96), torch.bfloat16, offsets=True)
    layer = PackedLinear(weight, kernels=(OwnTriton,))
    dense = weight.dequantize()
    assert torch.equal(layer.dequantize(), dense)
    index = torch.tensor([69, 0, 33, 33, 64])
    assert torch.equal(OwnTriton.rows(layer, index), dense[index])


@needs_triton
def test_wrong_shapes_are_named() -> None:
    from slimbench.methods.kernels.triton.packed_mm import product as multiply

    kept = layout.prepare(random_weight(4, 32, (32, 64), torch.float32))
    for inputs, bits, outputs in ((96, 4, 32), (64, 3, 32), (64, 4, 33)):
        with pytest.raises(ValueError, match=f"no {bits}-bit weight \\[{outputs}, {inputs}\\]"):
            multiply(torch.zeros(1, inputs), kept["weight_packed"], kept["scales"], None, bits, outputs)


def sparse(shape: tuple[int, int], dtype: torch.dtype, codes: bool, device: str = "cpu") -> Tensor | QuantizedWeight:
    """A weight of which each four inputs have zero, one or two that are not zero, in any place."""
    keys = torch.rand(shape, device=device).unflatten(1, (-1, 4))
    there = (keys.argsort(-1).argsort(-1) < torch.randint(0, 3, (*keys.shape[:2], 1), device=device)).flatten(1)
    if not codes:
        return (torch.randn(shape, device=device) * there).to(dtype)
    weight = random_weight(4, 64, shape, dtype, device=device)
    return QuantizedWeight(weight.grid, torch.where(there, weight.codes, 8).to(torch.uint8), weight.scales)


@needs_triton
@pytest.mark.parametrize("codes", [False, True], ids=["weights", "codes"])
@pytest.mark.parametrize("shape", [(33, 64), (1, 1152)], ids=str)
def test_sparse_product_equals_float64(codes: bool, shape: tuple[int, int]) -> None:
    from slimbench.methods.kernels.triton import sparse24

    torch.manual_seed(0)
    for dtype in (torch.float16, torch.float32):
        weight = sparse(shape, dtype, codes)
        packed = sparse24.compress_codes(weight) if isinstance(weight, QuantizedWeight) else sparse24.compress(weight)
        dense = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
        assert torch.equal(packed.dense(), dense)
        for rows in (0, 1, 3):
            x = torch.randn(rows, shape[1]).to(dtype)
            y = sparse24.product(x, packed)
            matrix = exact(weight) if isinstance(weight, QuantizedWeight) else weight.double()
            assert y.dtype is dtype and error(y, x, matrix) < 1 and error(sparse24.reference(x, packed), x, matrix) < 2


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sparse_layer_multiplies_and_reads_back(dtype: torch.dtype) -> None:
    """Few rows by the kernel, many by an expanded weight, both what float64 gives; outliers are added as to any other grid."""
    torch.manual_seed(0)
    weight = sparse((70, 192), dtype, codes=True)
    assert isinstance(weight, QuantizedWeight)
    layer = PackedLinear(weight, kernels=(OwnSparse,))
    assert layer.kernel == "slimbench triton sparse24" and torch.equal(layer.dequantize(), weight.dequantize())
    index = torch.tensor([69, 0, 33])
    assert torch.equal(OwnSparse.rows(layer, index), weight.dequantize()[index])
    for rows in (0, 1, 2, MOST_ROWS, MOST_ROWS + 1):
        x = torch.randn(rows, 192).to(dtype)
        assert error(layer(x), x, exact(weight)) < 2
    mask = torch.rand(70, 192) < 0.01
    values = torch.randn(70, 192).to(dtype)
    apart = Outliers.of(values, mask)
    layer = PackedLinear(QuantizedWeight(weight.grid, weight.codes, weight.scales, outliers=apart), kernels=(OwnSparse,))
    x = torch.randn(1, 192).to(dtype)
    assert error(layer(x), x, exact(weight) + values.double() * mask) < 2


@needs_triton
def test_the_sparse_kernel_takes_nothing_else() -> None:
    weight = sparse((33, 64), torch.float16, codes=True)
    assert isinstance(weight, QuantizedWeight) and OwnSparse.accepts(weight)
    fuller = weight.codes.clone()
    fuller[3, 4:7] = 1
    assert not OwnSparse.accepts(QuantizedWeight(weight.grid, fuller, weight.scales))
    assert not OwnSparse.accepts(QuantizedWeight(weight.grid, weight.codes, weight.scales, torch.zeros_like(weight.scales)))
    assert not OwnSparse.accepts(QuantizedWeight(Grid(3, 64), torch.full_like(weight.codes, 4), weight.scales))
    assert KERNELS.index(OwnSparse) < KERNELS.index(OwnTriton)


@needs_triton
def test_sparse_layout_is_small_and_as_documented() -> None:
    from slimbench.methods.kernels.triton import sparse24

    weight = torch.zeros(32, 64, dtype=torch.float16)
    weight[8 * 2 + 5, 32 + 4 * 7 + 1], weight[8 * 2 + 5, 32 + 4 * 7 + 3] = 5, 6  # r = 2, g = 5; kept as the 14th and 15th
    packed = sparse24.compress(weight)
    assert packed.values.nonzero().tolist() == [[0, 1, 14, 22], [0, 1, 15, 22]]
    assert packed.positions[0, 1, 22] & 0xF0000000 == 1 << 28 | 3 << 30
    assert 8 * (packed.positions.nbytes + packed.values.nbytes) / weight.numel() == 9
    codes = sparse24.compress_codes(sparse((32, 64), torch.float16, codes=True))  # type: ignore[arg-type]
    assert 8 * (codes.positions.nbytes + codes.values.nbytes) / weight.numel() == 3


@needs_triton
def test_what_is_not_sparse_is_refused() -> None:
    from slimbench.methods.kernels.triton import sparse24

    for weight, message in ((torch.ones(2, 32), "more than two of four"), (torch.zeros(2, 36), "36 inputs are no whole units")):
        with pytest.raises(ValueError, match=message):
            sparse24.compress(weight)
    with pytest.raises(ValueError, match="symmetric 4-bit grid"):
        sparse24.compress_codes(random_weight(8, 32, (2, 32), torch.float16))
    with pytest.raises(ValueError, match="x has 32 inputs, the weight 64"):
        sparse24.product(torch.zeros(1, 32), sparse24.compress(torch.zeros(2, 64)))


COMPILE = """
import re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from slimbench.methods.kernels.triton import packed_mm

def assembly(kernel, capability, config, **constants):
    constants |= config.kwargs
    pointers = {"x": "*bf16", "words": "*i32", "scales": "*bf16", "offsets": "*bf16", "y": "*bf16"}
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n not in constants and n != "rows"}
    places = {(i,): constants[n] for i, n in enumerate(kernel.arg_names) if n in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]

grid = {"BITS": 4, "FIRST": 4, "SECOND": 0, "OFFSETS": True}
for capability in (80, 90):
    few = assembly(packed_mm._few_rows, capability, packed_mm.FEW_SIZES[2], ROWS=2, **grid)
    loop = few[few.index("ld.global.v4") : few.rindex("ld.global.v4")]
    print(capability, "few", len(re.findall("ld.global.v4.b32", few)), "barriers", loop.count("bar.sync"))
    many = assembly(packed_mm._many_rows, capability, packed_mm.MANY_SIZES[3], BLOCK_ROWS=64, **grid)
    print(capability, "many", *sorted(set(re.findall("wgmma.mma_async|mma.sync|cp.async.cg", many))))
"""


@needs_triton
def test_compiles_for_cards(tmp_path: Path) -> None:
    """Without a card: 16-byte loads and no exchange between threads within the loop for few rows, tensor cores for many."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    script = tmp_path / "compile_kernels.py"  # Triton reads the source of what it compiles from files
    script.write_text(COMPILE)
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "80 few 2 barriers 0",
        "80 many cp.async.cg mma.sync",
        "90 few 2 barriers 0",
        "90 many cp.async.cg wgmma.mma_async",
    ]


def test_takes_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    def accepts(*arguments: Any) -> bool:
        return OwnTriton.accepts(random_weight(*arguments))

    assert accepts(4, 32, (8, 64), torch.float16) and accepts(8, None, (8, 96), torch.bfloat16)
    assert not accepts(8, None, (8, 48), torch.float16), "48 inputs are no whole units"
    assert not accepts(4, 32, (8, 64), torch.float64)
    w8a8 = random_weight(8, None, (8, 64), torch.float16)
    assert not OwnTriton.accepts(QuantizedWeight(Grid(8, None, 8), w8a8.codes, w8a8.scales))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not accepts(4, 32, (8, 64), torch.float16), "without the interpreter, a CPU tensor is not for Triton"


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(4, 32, (8, 64), torch.float16)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    layer = PackedLinear(weight, kernels=(OwnTriton, Dequantize))
    assert layer.kernel == Dequantize.name
    assert layer.kernel_missing == "slimbench triton packed_mm: triton is not installed (pip install triton)"
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr("slimbench.methods.kernels.triton.kernel.interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert OwnTriton.missing() == "no CUDA card"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert OwnTriton.missing() == "needs compute capability 8.0, this card has 7.5"
