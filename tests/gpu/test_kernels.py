"""Every GPU kernel on a real card, against float64 arithmetic. Run by hand: `pytest -n 0 tests/gpu`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch

from slimbench.methods.kernels.base import Kernel
from slimbench.methods.kernels.cuda.kernel import OwnCuda
from slimbench.methods.kernels.grid import BITS, GROUP_SIZES, QuantizedWeight
from slimbench.methods.kernels.packed_linear import PackedLinear
from slimbench.methods.kernels.torch.operators import Dequantize, TinyGemm
from slimbench.methods.kernels.triton.kernel import OwnTriton
from slimbench.methods.kernels.triton.sparse_kernel import OwnSparse
from tests.unit.methods.kernels.test_triton import error, exact, random_weight, sparse

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")]

ROWS = (0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 100, 300)
HALVES = (torch.float16, torch.bfloat16)


def make(kernel: type[Kernel], *arguments: object, offsets: bool = False) -> PackedLinear:
    weight = random_weight(*arguments, offsets=offsets, device="cuda")  # type: ignore[arg-type]
    if reason := kernel.missing():
        pytest.skip(reason)
    layer = PackedLinear(weight, kernels=(kernel,))
    assert torch.equal(layer.dequantize(), weight.dequantize())
    return layer


def check(layer: PackedLinear, rows: tuple[int, ...] = ROWS) -> None:
    weight = layer._kernel.restore(layer)
    dense = exact(weight)
    for count in rows:
        x = torch.randn(count, layer.in_features, device="cuda").to(layer.dtype)
        y = layer(x)
        assert y.shape == (count, layer.out_features) and y.dtype is layer.dtype
        assert error(y, x, dense) < 1, (count, layer)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize(("bits", "group"), list(product(BITS, (*GROUP_SIZES, None))), ids=str)
@pytest.mark.parametrize("offsets", [False, True], ids=["symmetric", "offsets"])
def test_triton(bits: int, group: int | None, dtype: torch.dtype, offsets: bool) -> None:
    check(make(OwnTriton, bits, group, (1100, 768), dtype, offsets=offsets))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("group", [*GROUP_SIZES, None], ids=str)
@pytest.mark.parametrize("offsets", [False, True], ids=["symmetric", "offsets"])
@pytest.mark.parametrize("shape", [(1, 256), (33, 768), (1024, 4096), (4096, 14336)], ids=str)
def test_cuda(shape: tuple[int, int], group: int | None, dtype: torch.dtype, offsets: bool) -> None:
    check(make(OwnCuda, 4, group, shape, dtype, offsets=offsets), (1, 2, 3, 4, 5, 6, 7, 8, 9, 40))


def test_triton_on_odd_shapes() -> None:
    for shape in ((1, 32), (31, 96), (33, 160), (4097, 4128)):
        check(make(OwnTriton, 4, 32, shape, torch.float16, offsets=True))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("codes", [False, True], ids=["weights", "codes"])
def test_sparse(codes: bool, dtype: torch.dtype) -> None:
    if reason := OwnTriton.missing():
        pytest.skip(reason)
    from slimbench.methods.kernels.triton import sparse24

    for shape in ((33, 64), (1100, 4096)):
        weight = sparse(shape, dtype, codes, "cuda")
        if isinstance(weight, QuantizedWeight):
            packed, dense = sparse24.compress_codes(weight), exact(weight)
        else:
            packed, dense = sparse24.compress(weight), weight.double()
        for rows in (0, 1, 3, 20):
            x = torch.randn(rows, shape[1], device="cuda").to(dtype)
            assert error(sparse24.product(x, packed), x, dense) < 1


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sparse_layer(dtype: torch.dtype) -> None:
    if reason := OwnSparse.missing():
        pytest.skip(reason)
    weight = sparse((1100, 4096), dtype, codes=True, device="cuda")
    layer = PackedLinear(weight, kernels=(OwnSparse,))  # type: ignore[arg-type]
    for rows in (0, 1, 3, 8, 9, 100):
        x = torch.randn(rows, 4096, device="cuda").to(dtype)
        assert error(layer(x), x, exact(weight)) < 2  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", [OwnCuda, OwnTriton], ids=lambda k: k.name)
def test_runs_in_a_captured_graph_and_on_another_stream(kernel: type[Kernel]) -> None:
    layer = make(kernel, 4, 128, (512, 1024), torch.bfloat16)
    x = torch.randn(1, 1024, device="cuda").bfloat16()
    want = layer(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(layer(x), want)
    torch.cuda.current_stream().wait_stream(stream)
    graph, still = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        y = layer(still)
    for _ in range(3):
        still.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, layer(still))


@pytest.mark.parametrize("kernel", [OwnCuda, OwnTriton, TinyGemm], ids=lambda k: k.name)
@pytest.mark.parametrize("offsets", [False, True], ids=["symmetric", "offsets"])
def test_a_few_rows_are_looked_up(kernel: type[Kernel], offsets: bool) -> None:
    layer = make(kernel, 4, 128, (4096, 1024), torch.bfloat16, offsets=offsets)
    for index in ([4095, 0, 70, 70, 1], range(4095, -1, -3)):
        at = torch.tensor(list(index), device="cuda")
        assert torch.equal(layer.rows(at), layer.dequantize()[at])


def test_inputs_need_no_alignment() -> None:
    layer = make(OwnCuda, 4, 32, (64, 64), torch.float16)
    x = torch.randn(65, device="cuda").half()[1:].view(1, 64)
    assert x.data_ptr() % 16
    assert torch.equal(layer(x), layer(x.clone()))


@pytest.mark.parametrize("kernel", [OwnCuda, OwnTriton, TinyGemm], ids=lambda k: k.name)
def test_one_token_is_faster_than_expanding_the_weight(kernel: type[Kernel], record_property: Callable[[str, object], None]) -> None:
    weight = random_weight(4, 128, (4096, 14336), torch.bfloat16, offsets=True, device="cuda")
    if reason := kernel.missing():
        pytest.skip(reason)
    x = torch.randn(1, 14336, device="cuda").bfloat16()
    microseconds = {}
    for candidate in (kernel, Dequantize):
        layer = PackedLinear(weight, kernels=(candidate,))
        microseconds[candidate.name] = _median_microseconds(layer, x)
    moved = 4096 * (14336 / 2 + 14336 // 128 * 4)
    record_property("GB/s", round(moved / microseconds[kernel.name] / 1000))
    assert microseconds[kernel.name] < microseconds[Dequantize.name] / 2, microseconds


def _median_microseconds(layer: PackedLinear, x: torch.Tensor) -> float:
    """Of twenty calls, with the second-level cache overwritten between them."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    times = []
    for repeat in range(23):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        layer(x)
        end.record()
        torch.cuda.synchronize()
        if repeat > 2:
            times.append(1000 * begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]
