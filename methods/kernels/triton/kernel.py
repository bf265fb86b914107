"""The own Triton kernels as a `Kernel`."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from slimbench.methods.kernels.base import Kernel
from slimbench.methods.kernels.grid import QuantizedWeight
from slimbench.methods.kernels.triton import layout

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_OLDEST = (8, 0)


class TritonKernel(Kernel):
    """Every grid of integers whose groups are multiples of 32 inputs, on a CUDA card; on a CPU only in Triton's interpreter."""

    @classmethod
    def accepts(cls, weight: QuantizedWeight) -> bool:
        here = weight.codes.is_cuda or (weight.codes.device.type == "cpu" and interpreted())
        integers = weight.grid.activation_bits is None and weight.grid.number == "int"
        return here and integers and weight.scales.dtype in _DTYPES and layout.fits(weight)

    @classmethod
    def missing(cls) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install triton)"
        if interpreted():
            return None
        if not torch.cuda.is_available():
            return "no CUDA card"
        found = torch.cuda.get_device_capability()
        if found < _OLDEST:
            return f"needs compute capability 8.0, this card has {found[0]}.{found[1]}"
        return None


class OwnTriton(TritonKernel):
    """Weights in tiles of rows."""

    name = "slimbench triton packed_mm"

    @classmethod
    def prepare(cls, weight: QuantizedWeight) -> dict[str, Tensor]:
        operator()
        return layout.prepare(weight)

    @classmethod
    def multiply(cls, layer: Any, x: Tensor) -> Tensor:
        return torch.ops.slimbench.triton_packed_mm(
            x.contiguous(), layer.weight_packed, layer.scales, getattr(layer, "offsets", None), layer.grid.bits, layer.out_features
        )

    @classmethod
    def restore(cls, layer: Any) -> QuantizedWeight:
        return layout.restore(layer.grid, layer.weight_packed, layer.scales, getattr(layer, "offsets", None), layer.out_features)

    @classmethod
    def rows(cls, layer: Any, index: Tensor) -> Tensor:
        """Some rows of the weight, dequantized: [n, in] for an index [n]. The tiles in which they lie are expanded one for each."""
        tile, row = index // layout.ROWS, index % layout.ROWS
        offsets = getattr(layer, "offsets", None)
        moved = None if offsets is None else offsets[tile]
        found = layout.restore(layer.grid, layer.weight_packed[tile], layer.scales[tile], moved, len(index) * layout.ROWS)
        return found.take(torch.arange(len(index), device=index.device) * layout.ROWS + row).dequantize()


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def operator() -> torch.library.Library:
    """Registers `slimbench::triton_packed_mm`, through which a product is seen by torch's dispatcher and can be compiled."""
    library = torch.library.Library("slimbench", "FRAGMENT")
    library.define("triton_packed_mm(Tensor x, Tensor words, Tensor scales, Tensor? offsets, int bits, int outputs) -> Tensor")
    for device in ("CPU", "CUDA"):
        library.impl("triton_packed_mm", _product, device)
    torch.library.register_fake("slimbench::triton_packed_mm", _shape, lib=library)
    return library


def _product(x: Tensor, words: Tensor, scales: Tensor, offsets: Tensor | None, bits: int, outputs: int) -> Tensor:
    from slimbench.methods.kernels.triton.packed_mm import product

    return product(x, words, scales, offsets, bits, outputs)


def _shape(x: Tensor, words: Tensor, scales: Tensor, offsets: Tensor | None, bits: int, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)
