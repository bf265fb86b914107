"""What the kernel benchmark runs: torch's dense product, every packed kernel on every grid that it takes, sparse weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from slimbench.methods.kernels.base import Kernel
from slimbench.methods.kernels.bitmap_linear import BitmapLinear, BitmapWeight
from slimbench.methods.kernels.cpu import sparse
from slimbench.methods.kernels.grid import Grid, QuantizedWeight
from slimbench.methods.kernels.packed_linear import KERNELS, PackedLinear
from slimbench.methods.kernels.torch.operators import Dequantize

GRIDS = (Grid(2, 64), Grid(3, 64), Grid(4, 32), Grid(4, 64), Grid(4, 128), Grid(8), Grid(8, None, 8), Grid(8, None, 8, "e4m3"))
ZEROS = (0.5, 0.75)
"""Shares of a sparse weight; of 16 bits then 9 and 5 are stored."""


@dataclass(frozen=True)
class Subject:
    """One way to multiply with a layer's weight.

    Attributes:
        kernel: Its name in evidence and records.
        bits: Bits of a weight before scales, 16 for a dense one; of a sparse one on average, with the bit that tells its place.
        group_size: Inputs that share a scale; None for a row, or where there is none.
        make: `(outputs, inputs) -> layer` with random weights.

    Raises:
        ValueError: From `make`, where the kernel takes no such layer.
    """

    kernel: str
    bits: int
    group_size: int | None
    make: Callable[[int, int], nn.Module]


def subjects(device: torch.device, dtype: torch.dtype) -> Iterator[Subject]:
    """The dense product first; then the kernels that can be had on the device. The one that expands its weight is left out."""
    yield Subject("torch linear", 8 * dtype.itemsize, None, partial(_dense, device, dtype))
    for kernel in KERNELS:
        for grid in GRIDS:
            sample = random_weight(grid, 64, 256, device, dtype, kernel.pattern)
            if kernel is not Dequantize and kernel.accepts(sample) and kernel.missing() is None:
                yield Subject(kernel.name, grid.bits, grid.group_size, partial(_packed, kernel, grid, device, dtype))
    if sparse.accepts(torch.empty(0, device=device, dtype=dtype)) and sparse.missing() is None:
        for zeros in ZEROS:
            bits = int(8 * dtype.itemsize * (1 - zeros)) + 1
            yield Subject(sparse.NAME, bits, None, partial(_sparse, zeros, device, dtype))


def random_weight(
    grid: Grid, outputs: int, inputs: int, device: torch.device, dtype: torch.dtype, pattern: str | None = None
) -> QuantizedWeight:
    """Random codes with scales as of a weight of size 0.02; symmetric. With the pattern 2:4 the last two of each four weights are zero."""
    low, high, stored = (-128, 128, torch.int8) if grid.bits == 8 else (0, 1 << grid.bits, torch.uint8)
    codes = torch.randint(low, high, (outputs, inputs), dtype=stored)
    if grid.number == "e4m3":
        codes = codes.to(torch.float8_e4m3fn)
    if pattern == "2:4":
        codes.unflatten(1, (-1, 4))[..., 2:] = grid.mid
    scales = (torch.rand(outputs, inputs // (grid.group_size or inputs)) + 0.5) * 0.04 / (1 << grid.bits)
    return QuantizedWeight(grid, codes.to(device), scales.to(device, dtype))


def _packed(kernel: type[Kernel], grid: Grid, device: torch.device, dtype: torch.dtype, outputs: int, inputs: int) -> nn.Module:
    return PackedLinear(random_weight(grid, outputs, inputs, device, dtype, kernel.pattern), kernels=(kernel,))


def _sparse(zeros: float, device: torch.device, dtype: torch.dtype, outputs: int, inputs: int) -> nn.Module:
    weight = torch.randn(outputs, inputs) * (torch.rand(outputs, inputs) >= zeros)
    return BitmapLinear(BitmapWeight.of(weight.to(device, dtype)))


def _dense(device: torch.device, dtype: torch.dtype, outputs: int, inputs: int) -> nn.Module:
    return nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)
