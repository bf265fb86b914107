"""Rounding to the number formats of quantized activations: integers, small floating-point formats, and blocks with rounded scales.

A value is rounded as `scale · round(x / scale)`. The scale comes from the largest magnitude among the values that share it (a
token, the tensor, or a group of consecutive inputs), so that this magnitude meets the largest number of the format; an asymmetric
integer grid runs from the smallest to the largest value, both widened to hold zero, and zero is one of its points.

Block formats: with `e8m0` scales (OCP Microscaling) a scale is the power of two 2^(floor(log2 max) - emax), emax being the exponent
of the largest number of the format; larger values saturate. With `e4m3` scales (NVFP4) a scale is an e4m3 number times one
float32 scale of the tensor, max / (448 · largest); where none is given, it is that of the token.

Outlier-victim pairs (`ovp`, OliVe, arXiv 2304.07493): integers -7 .. 7, but of two neighbours whose larger one is beyond 7, that one
goes to the nearest of ±12, 16, 24, 32, 48, 64, 96 (e2m1 with an exponent bias of its own) and the other one to zero, so
that its code can say so. The scale must be given, or nothing is beyond 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class _Float(NamedTuple):
    mantissa: int
    smallest_exponent: int
    largest: float
    largest_exponent: int


_BITS = {"e4m3": 8, "e2m1": 4, "ovp": 4}
_OUTLIERS = (12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0)

FLOATS = {"e4m3": _Float(3, -6, 448.0, 8), "e2m1": _Float(1, 0, 6.0, 2)}


@dataclass(frozen=True)
class ActivationGrid:
    """How the inputs of a layer are rounded.

    Attributes:
        format: Number format; `int` has `bits`.
        bits: Of a number.
        granularity: What shares a scale: a token, the whole tensor, or `group_size` consecutive inputs of a token.
        symmetric: Integers centred on zero; else between the smallest and the largest value.
        scale_format: Rounding of the scales of groups.
        clip: The largest magnitude is multiplied by it before the scale is made of it, 0..1; what is larger saturates.
    """

    format: Literal["int", "e4m3", "e2m1", "ovp"]
    bits: int = 8
    granularity: Literal["token", "tensor", "group"] = "token"
    group_size: int | None = None
    symmetric: bool = True
    scale_format: Literal["none", "e8m0", "e4m3"] = "none"
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.format != "int" and self.bits != _BITS[self.format]:
            raise ValueError(f"{self.format} numbers do not have {self.bits} bits")
        if not 2 <= self.bits <= 16:
            raise ValueError(f"bits must be between 2 and 16, not {self.bits}")
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("group_size goes with the granularity group")
        if self.format != "int" and not self.symmetric:
            raise ValueError(f"{self.format} numbers are symmetric")
        if self.scale_format != "none" and (self.format not in FLOATS or self.granularity != "group"):
            raise ValueError(f"{self.scale_format} scales go with groups of floating-point numbers")
        if not 0 < self.clip <= 1:
            raise ValueError(f"clip must be above 0 and at most 1, not {self.clip}")

    @property
    def largest(self) -> float:
        """The largest number of a symmetric format, before scales."""
        return FLOATS[self.format].largest if self.format in FLOATS else 2.0 ** (self.bits - 1) - 1


def minifloat(x: Tensor, format: Literal["e4m3", "e2m1"]) -> Tensor:
    """Round float32 numbers to a small floating-point format: nearest, ties to even, larger ones to its largest; NaN stays."""
    kind = FLOATS[format]
    x = x.clamp(-kind.largest, kind.largest)
    exponent = torch.frexp(x).exponent.float() - 1
    step = torch.exp2(exponent.clamp_min(kind.smallest_exponent) - kind.mantissa)
    return torch.round(x / step) * step


def outlier_victim(x: Tensor) -> Tensor:
    """Round float32 numbers [..., n], n even, in pairs of neighbours: to -7 .. 7, or an outlier and a zero."""
    pairs = x.unflatten(-1, (-1, 2))
    outlier = torch.round(pairs).abs() > 7
    outlier = outlier & (torch.arange(2, device=x.device) == pairs.abs().argmax(-1, keepdim=True))
    points = torch.tensor(_OUTLIERS, device=x.device)
    nearest = points[torch.bucketize(pairs.abs(), (points[1:] + points[:-1]) / 2)] * pairs.sign()
    normal = torch.round(pairs).clamp(-7, 7).masked_fill(outlier.flip(-1), 0.0)
    return torch.where(outlier, nearest, normal).flatten(-2)


def fake_quantize(x: Tensor, grid: ActivationGrid, scale: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    """Round x [..., in] to a grid, in float32; the result has the dtype of x.

    Args:
        scale: Static scale, broadcast against x; with `e4m3` scales that of the tensor. None: from x itself.
        offset: Value of the smallest code of an asymmetric grid, broadcast against x; goes with `scale`.
    """
    values = x.float()
    if grid.granularity == "group":
        values = values.unflatten(-1, (-1, grid.group_size))
    if scale is None or grid.granularity == "group":
        scale, offset = scales(values, grid, scale)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale).float()
    if grid.format == "ovp":
        values = outlier_victim(values / scale) * scale
    elif grid.format != "int":
        values = minifloat(values / scale, grid.format) * scale
    elif grid.symmetric:
        values = torch.round(values / scale).clamp(-grid.largest, grid.largest) * scale
    else:
        assert offset is not None
        values = torch.round((values - offset) / scale).clamp(0, 2**grid.bits - 1) * scale + offset
    return (values.flatten(-2) if grid.granularity == "group" else values).to(x.dtype)


def scales(values: Tensor, grid: ActivationGrid, tensor_scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Scales and, for an asymmetric grid, offsets of float32 values whose last dimension shares one; all of them for a tensor.

    Args:
        values: [..., in], or [..., groups, group_size].
        tensor_scale: Scale of the tensor that goes with `e4m3` scales.
    """
    whole = grid.granularity == "tensor"
    if not grid.symmetric:
        low = values.amin() if whole else values.amin(-1, keepdim=True)
        high = values.amax() if whole else values.amax(-1, keepdim=True)
        return range_scales(low, high, grid)
    largest = (values.abs().amax() if whole else values.abs().amax(-1, keepdim=True)) * grid.clip
    if grid.scale_format == "e8m0":
        exponent = torch.frexp(largest).exponent.float() - 1 - FLOATS[grid.format].largest_exponent
        return torch.where(largest > 0, torch.exp2(exponent.clamp(-127, 127)), 1.0), None
    scale = largest / grid.largest
    if grid.scale_format == "e4m3":
        shared = scale.amax(-2, keepdim=True) / FLOATS["e4m3"].largest if tensor_scale is None else tensor_scale
        shared = torch.where(shared == 0, torch.ones_like(shared), shared)
        scale = minifloat(scale / shared, "e4m3") * shared
    return scale, None


def range_scales(low: Tensor, high: Tensor, grid: ActivationGrid) -> tuple[Tensor, Tensor]:
    """Scale and offset of an asymmetric integer grid over ranges; zero is on the grid."""
    low, high = low.clamp_max(0) * grid.clip, high.clamp_min(0) * grid.clip
    scale = (high - low) / (2**grid.bits - 1)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, torch.round(low / scale) * scale


def hadamard(x: Tensor, block: int) -> Tensor:
    """The orthonormal Walsh-Hadamard transform, in Sylvester's order, of each run of `block` numbers in the last dimension."""
    if block < 1 or block & (block - 1) or x.shape[-1] % block:
        raise ValueError(f"{block} is no power of two that divides {x.shape[-1]}")
    made, width = x.reshape(-1, block, 1), 1
    while width < block:
        pairs = made.reshape(-1, block // (2 * width), 2, width)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        made, width = torch.cat((first + second, first - second), -1), 2 * width
    return (made * block**-0.5).reshape(x.shape)


def largest_power_of_two(number: int) -> int:
    """The largest power of two that divides a number: the widest Hadamard block for so many inputs."""
    return number & -number
