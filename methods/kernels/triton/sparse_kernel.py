"""The Triton kernel for 4-bit codes with 2:4 zeros as a `Kernel`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimbench.methods.kernels.grid import QuantizedWeight, two_of_four
from slimbench.methods.kernels.triton.kernel import TritonKernel

if TYPE_CHECKING:
    from slimbench.methods.kernels.triton.sparse24 import Sparse24

MOST_ROWS = 8


class OwnSparse(TritonKernel):
    """Symmetric 4-bit codes of which each four consecutive inputs have at most two that are not zero: 3 bits are read for each weight.

    More than eight rows of inputs go through an expanded weight: there the arithmetic counts, not the bytes.
    """

    name = "slimbench triton sparse24"
    pattern = "2:4"

    @classmethod
    def accepts(cls, weight: QuantizedWeight) -> bool:
        return weight.grid.bits == 4 and weight.symmetric and super().accepts(weight) and two_of_four(weight.codes, weight.grid.mid)

    @classmethod
    def prepare(cls, weight: QuantizedWeight) -> dict[str, Tensor]:
        from slimbench.methods.kernels.triton.sparse24 import compress_codes

        operator()
        packed = compress_codes(QuantizedWeight(weight.grid, weight.codes, weight.scales))
        assert packed.scales is not None
        return {"positions": packed.positions, "weight_packed": packed.values, "scales": packed.scales}

    @classmethod
    def multiply(cls, layer: Any, x: Tensor) -> Tensor:
        if x.shape[0] > MOST_ROWS:
            return nn.functional.linear(x, cls.restore(layer).dequantize())
        return torch.ops.slimbench.triton_sparse24_mm(
            x.contiguous(), layer.positions, layer.weight_packed, layer.scales, layer.out_features
        )

    @classmethod
    def restore(cls, layer: Any) -> QuantizedWeight:
        return _packed(layer.positions, layer.weight_packed, layer.scales, layer.out_features).codes(layer.grid)


def _packed(positions: Tensor, values: Tensor, scales: Tensor, outputs: int) -> Sparse24:
    from slimbench.methods.kernels.triton.sparse24 import Sparse24

    return Sparse24(positions, values, scales, outputs)


@functools.cache
def operator() -> torch.library.Library:
    """Registers `slimbench::triton_sparse24_mm`, through which a product is seen by torch's dispatcher and can be compiled."""
    library = torch.library.Library("slimbench", "FRAGMENT")
    library.define("triton_sparse24_mm(Tensor x, Tensor positions, Tensor values, Tensor scales, int outputs) -> Tensor")
    for device in ("CPU", "CUDA"):
        library.impl("triton_sparse24_mm", _product, device)
    torch.library.register_fake("slimbench::triton_sparse24_mm", _shape, lib=library)
    return library


def _product(x: Tensor, positions: Tensor, values: Tensor, scales: Tensor, outputs: int) -> Tensor:
    from slimbench.methods.kernels.triton.sparse24 import product

    return product(x, _packed(positions, values, scales, outputs))


def _shape(x: Tensor, positions: Tensor, values: Tensor, scales: Tensor, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)
