"""The own CUDA decode kernel as a `Kernel`: up to eight rows of inputs; more of them are the Triton kernels' affair."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from slimbench.methods.kernels.cuda import build
from slimbench.methods.kernels.grid import QuantizedWeight
from slimbench.methods.kernels.triton.kernel import OwnTriton
from slimbench.methods.kernels.triton.layout import ROWS, UNIT

MOST_ROWS = 8
_MOST_WARPS, _USUAL_WARPS = 16, 8
_AHEAD = 4  # units that a warp reads ahead
_ALIGNMENT = 16
_DTYPES = (torch.float16, torch.bfloat16)


class OwnCuda(OwnTriton):
    """4-bit codes whose groups are multiples of 32 inputs, in float16 and bfloat16, on a CUDA card. Buffers as for Triton."""

    name = "slimbench cuda w4a16"

    @classmethod
    def accepts(cls, weight: QuantizedWeight) -> bool:
        return weight.grid.bits == 4 and weight.codes.is_cuda and weight.scales.dtype in _DTYPES and super().accepts(weight)

    @classmethod
    def missing(cls) -> str | None:
        return super().missing() or build.missing()

    @classmethod
    def prepare(cls, weight: QuantizedWeight) -> dict[str, Tensor]:
        operator()
        return super().prepare(weight)

    @classmethod
    def multiply(cls, layer: Any, x: Tensor) -> Tensor:
        if not 0 < x.shape[0] <= MOST_ROWS:
            return super().multiply(layer, x)
        offsets = getattr(layer, "offsets", None)
        return torch.ops.slimbench.cuda_w4a16_mm(x.contiguous(), layer.weight_packed, layer.scales, offsets, layer.out_features)


def decode(library: ctypes.CDLL, x: Tensor, words: Tensor, scales: Tensor, offsets: Tensor | None, y: Tensor, warps: int) -> None:
    """Call the kernel. Buffers are described in `methods.kernels.triton.layout`; all of them contiguous and on one device.

    Args:
        library: From `build.library` on a card, from `build.emulated` on a CPU.
        x: [1..8, in], float16 or bfloat16; scales and offsets have its dtype.
        y: [rows, out], written.
        warps: Of a block, 1 to 16.

    Raises:
        ValueError: The tensors do not belong together.
        RuntimeError: CUDA could not start the kernel.
    """
    rows, inputs = x.shape
    tiles, units, width = words.shape
    groups = scales.shape[1]
    grouped = groups == 1 or (units % groups == 0 and (units // groups).bit_count() == 1)
    sized = 0 < rows <= MOST_ROWS and inputs == units * UNIT and width == 4 * ROWS and grouped and 0 < warps <= _MOST_WARPS
    alike = x.dtype in _DTYPES and x.dtype is scales.dtype is y.dtype and y.shape[0] == rows and -(-y.shape[1] // ROWS) == tiles
    if not sized or not alike:
        raise ValueError(f"x {list(x.shape)}, words {list(words.shape)} and {groups} groups do not make {list(y.shape)}")
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    moved = None if offsets is None else offsets.data_ptr()
    tensors = (x.data_ptr(), words.data_ptr(), scales.data_ptr(), moved, y.data_ptr())
    sizes = (rows, y.shape[1], units, groups)
    error = library.slimbench_w4a16_decode(*tensors, *sizes, x.dtype is torch.bfloat16, warps, x.device.index or 0, stream)
    if error:
        raise RuntimeError(f"the CUDA decode kernel did not start: {library.slimbench_describe(error).decode()}")


def warps(tiles: int, units: int, processors: int) -> int:
    """Warps of a block: enough units for each to read ahead, and more of them where there are few blocks for the card's processors."""
    most = _MOST_WARPS if tiles < 2 * processors else _USUAL_WARPS
    return max(1, min(most, units // _AHEAD))


@functools.cache
def operator() -> torch.library.Library:
    """Registers `slimbench::cuda_w4a16_mm`, through which a product is seen by torch's dispatcher and can be compiled."""
    library = torch.library.Library("slimbench", "FRAGMENT")
    library.define("cuda_w4a16_mm(Tensor x, Tensor words, Tensor scales, Tensor? offsets, int outputs) -> Tensor")
    library.impl("cuda_w4a16_mm", _product, "CUDA")
    torch.library.register_fake("slimbench::cuda_w4a16_mm", _shape, lib=library)
    return library


def _product(x: Tensor, words: Tensor, scales: Tensor, offsets: Tensor | None, outputs: int) -> Tensor:
    y = torch.empty(x.shape[0], outputs, dtype=x.dtype, device=x.device)
    aligned = x.clone() if x.data_ptr() % _ALIGNMENT else x
    with torch.cuda.device(x.device):
        decode(build.library(), aligned, words, scales, offsets, y, warps(words.shape[0], words.shape[1], _processors(x.device)))
    return y


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _shape(x: Tensor, words: Tensor, scales: Tensor, offsets: Tensor | None, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)
