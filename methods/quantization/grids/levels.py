"""Number formats of few bits as tables of levels, and rounding to them.

Levels stand in the order of their bit patterns, sign first: code 0b1001 of e2m1 is minus the level 0b001.

    e2m1   1 sign, 2 exponent, 1 mantissa bit: ±0, .5, 1, 1.5, 2, 3, 4, 6
    e4m3   1 sign, 4 exponent, 3 mantissa bits, no infinities: up to ±448; two codes are NaN
    e8m0   8 exponent bits alone: 2^-127 .. 2^127
    int4   two's complement, -8 .. 7
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1_MAX = 6.0
E4M3_MAX = 448.0
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_EXPONENT = 2
_INT4 = (*range(8), *range(-8, 0))


def table(levels: Tensor, dtype: torch.dtype) -> Tensor:
    """One table of scalars for all layers that hold it, [1, 1, entries, 1]."""
    return levels.to(dtype).view(1, 1, -1, 1)


def e2m1() -> Tensor:
    """The 16 levels of e2m1, float32; code 8 is minus zero."""
    positive = torch.tensor(_E2M1)
    return torch.cat([positive, -positive])


def to_e2m1(x: Tensor) -> Tensor:
    """Codes of e2m1, uint8: round to nearest, ties to the even mantissa; what is larger than 6 becomes 6."""
    size = x.abs().float()
    step = torch.exp2(size.log2().floor().clamp(0, _E2M1_EXPONENT) - 1)
    level = ((size / step).round() * step).clamp(max=E2M1_MAX)
    code = torch.bucketize(level, torch.tensor(_E2M1, device=x.device))
    return (code + 8 * ((x < 0) & (code > 0))).to(torch.uint8)


def int4() -> Tensor:
    """The 16 levels of int4, float32."""
    return torch.tensor(_INT4, dtype=torch.float32)


def to_int4(x: Tensor) -> Tensor:
    """Codes of int4, uint8: round to nearest, ties to even; what does not fit is clamped."""
    return (x.float().round().clamp(-8, 7).to(torch.int8) & 15).to(torch.uint8)


def mx_scales(largest: Tensor) -> Tensor:
    """The e8m0 scales of e2m1 blocks with these largest magnitudes: 2^(floor(log2 largest) - 2), as the OCP MX specification has it."""
    exponent = torch.frexp(largest.float()).exponent - 1 - _E2M1_EXPONENT
    exponent = torch.where(largest > 0, exponent, torch.zeros_like(exponent)).clamp(-127, 127)
    return (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def nonzero(scales: Tensor) -> Tensor:
    """Scales to divide by: 1 where a block has none."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)
