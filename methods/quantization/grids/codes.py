"""Codes that a library left behind, on the grid of the packed format.

Libraries write an asymmetric grid with a zero point, w = (q - z) · s; the packed format with an offset, w = (q - mid) · s + o. So
o = (mid - z) · s, rounded once to the model's dtype, and that rounding is all that may differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from slimbench.methods.kernels.grid import Grid, QuantizedWeight


def from_zero_points(codes: Tensor, scales: Tensor, zeros: Tensor, grid: Grid, dtype: torch.dtype) -> QuantizedWeight:
    """A weight from unsigned codes.

    Args:
        codes: [out, in], whole numbers 0 .. 2^bits - 1 of any dtype.
        scales: [out, groups].
        zeros: [out, groups], the code, whole or not, of a weight 0.
        dtype: That of the model, in which scales and offsets are stored.
    """
    import torch

    from slimbench.methods.kernels.grid import QuantizedWeight

    half = 2 ** (grid.bits - 1)
    offsets = ((half - zeros.float()) * scales.float()).to(dtype)
    whole = (codes.to(torch.int16) - half).to(torch.int8) if grid.bits == 8 else codes.to(torch.uint8)
    return QuantizedWeight(grid, whole.contiguous(), scales.to(dtype).contiguous(), offsets.contiguous())


def check_equal(name: str, weight: QuantizedWeight, wanted: Tensor) -> None:
    """Hold a packed weight against what the library computes with, [out, in].

    Raises:
        RuntimeError: They differ by more than roundings of scale, offset and result to the dtype of the packed weight, and of the
            differences, products and sums on the way to float32.
    """
    import torch

    unit = torch.finfo(weight.scales.dtype).eps + 2 * torch.finfo(torch.float32).eps
    span = 2 ** (weight.grid.bits - 1) * weight.scales.float().abs()
    slack = span if weight.offsets is None else span + weight.offsets.float().abs()
    difference = (weight.dequantize().float() - wanted.float()).abs().unflatten(1, (weight.scales.shape[1], -1)).amax(-1)
    if bool((difference > unit * slack).any()):
        largest = float((difference / weight.scales.float().abs()).max())
        raise RuntimeError(f"{name}: weights of the library do not lie on their grid of {weight.grid.bits} bits: {largest:.2g} steps off")
