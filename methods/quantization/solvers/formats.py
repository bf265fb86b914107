"""GPTQ onto grids that no packed format has: small floating-point numbers, and a tail of columns on a finer grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slimbench.methods.core.second_order import Moments, inverse_factor, sweep
from slimbench.methods.kernels.numbers import ActivationGrid, fake_quantize, scales


@dataclass(frozen=True)
class Rounded:
    """A weight [out, in] that lies on its grid, in the model's dtype."""

    values: Tensor

    def dequantize(self) -> Tensor:
        return self.values


@dataclass(frozen=True)
class Part:
    """Consecutive columns of a weight and the grid that they are rounded to.

    Attributes:
        width: How many.
        adjust: Made of the scales [out, groups] before they are used; None: nothing.
    """

    width: int
    grid: ActivationGrid
    adjust: Callable[[Tensor], Tensor] | None = None

    def scales(self, weight: Tensor) -> Tensor:
        """The scale of each weight [out, width]."""
        size = self.grid.group_size
        found, _ = scales(weight.unflatten(1, (-1, size)) if size else weight, self.grid)
        found = found.reshape(len(weight), -1) if found.dim() else found.expand(len(weight), 1)
        found = torch.where(found == 0, torch.ones_like(found), found)
        found = self.adjust(found) if self.adjust else found
        return found.repeat_interleave(self.width // found.shape[1], dim=1)


def solve(weight: Tensor, moments: Moments, parts: list[Part], dampening: float) -> Rounded:
    """Round a weight [out, in], the columns in their order; scales come from the weights as they are before.

    Args:
        parts: Side by side, they cover the columns.
    """
    dense = weight.float()
    pieces = dense.split([part.width for part in parts], dim=1)
    steps = torch.cat([part.scales(piece) for part, piece in zip(parts, pieces, strict=True)], dim=1).T.contiguous()
    single = [replace(part.grid, granularity="tensor", group_size=None, scale_format="none") for part in parts for _ in range(part.width)]

    def rounder(place: int, pending: Tensor) -> Tensor:
        return fake_quantize(pending[0], single[place], steps[place])

    rounded = sweep(dense, inverse_factor(moments.hessian, dampening), rounder)
    return Rounded(rounded.to(weight.dtype))
