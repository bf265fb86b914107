"""SpQR as in the paper (arXiv 2306.03078): outliers, small groups with offsets, and scales and zero points of two levels."""

from __future__ import annotations

import torch
from torch import Tensor

from slimbench.methods.core.second_order import Moments, inverse_factor, sweep
from slimbench.methods.formats.bilevel import Bilevel
from slimbench.methods.formats.codebook import CodebookWeight
from slimbench.methods.kernels.grid import Grid, Outliers
from slimbench.methods.quantization.grids.outliers import costs, gains, threshold_of


class BilevelRounder:
    """Rounds columns in their order; the outliers and the grid of a group are found when it is reached.

    Args:
        size: Inputs of a group.
        statistic_bits: Of a scale and of a zero point.
        dtype: Of outliers and of the ranges of the second level.
        cost: What a squared rounding error in each column costs the outputs, [in].
        threshold: Gain above which a weight is an outlier.
    """

    def __init__(
        self, shape: torch.Size, bits: int, size: int, statistic_bits: int, dtype: torch.dtype, cost: Tensor, threshold: float
    ) -> None:
        outputs, inputs = shape
        self.bits, self.size, self.statistic_bits, self.dtype = bits, size, statistic_bits, dtype
        self.cost, self.threshold = cost, threshold
        self.codes = torch.zeros(inputs, outputs, dtype=torch.uint8, device=cost.device)
        self.apart = torch.zeros(inputs, outputs, dtype=torch.bool, device=cost.device)
        self.kept = torch.zeros(inputs, outputs, device=cost.device)
        self.groups: list[Bilevel] = []

    def __call__(self, place: int, pending: Tensor) -> Tensor:
        if place % self.size == 0:
            self._fit(place, pending[: self.size].T)
        outlier, values = self.apart[place], pending[0]
        codes = (torch.where(outlier, 0.0, values) / self._scales + self._zeros).round().clamp(0, 2**self.bits - 1)
        self.codes[place] = codes.to(torch.uint8)
        self.kept[place] = torch.where(outlier, values.to(self.dtype).float(), 0.0)
        return torch.where(outlier, self.kept[place], self._scales * (codes - self._zeros))

    def _fit(self, place: int, weights: Tensor) -> None:
        """Find outliers and grid of the group that begins at a place, from its weights [out, size]."""
        gain = gains(weights, self.cost[place : place + self.size], Grid(self.bits), torch.float32, symmetric=False)  # type: ignore[arg-type]
        outlier = gain > self.threshold
        self.apart[place : place + self.size] = outlier.T
        middle = torch.where(outlier, 0.0, weights).sum(1, keepdim=True) / (~outlier).sum(1, keepdim=True).clamp_min(1)
        low, high = torch.where(outlier, middle, weights).aminmax(dim=1)
        flat = high == low
        low, high = torch.where(flat, low - 1, low), torch.where(flat, high + 1, high)
        scales = (high - low) / (2**self.bits - 1)
        group = Bilevel.of(scales.unsqueeze(1), (-low / scales).unsqueeze(1), self.statistic_bits, self.dtype)
        self._scales, self._zeros = (part.squeeze(1) for part in group.expand())
        self.groups.append(group)

    def result(self, table: Tensor) -> CodebookWeight:
        """The weight, once all columns have been rounded; `table` holds the levels 0, 1, … [1, 1, levels, 1]."""
        outliers = Outliers.of(self.kept.T.to(self.dtype), self.apart.T)
        return CodebookWeight.of(
            self.codes.T.unsqueeze(0), table, self.bits, self.dtype, bilevel=Bilevel.joined(self.groups), outliers=outliers
        )


def quantize(
    weight: Tensor, moments: Moments, table: Tensor, bits: int, size: int, statistic_bits: int, dampening: float, fraction: float
) -> CodebookWeight:
    """Quantize a weight [out, in] of the model's dtype and keep about a fraction of its weights apart."""
    dense, factor = weight.float(), inverse_factor(moments.hessian, dampening)
    cost = costs(factor)
    threshold = threshold_of(dense, cost, Grid(bits), size, torch.float32, symmetric=False, fraction=fraction)  # type: ignore[arg-type]
    rounder = BilevelRounder(weight.shape, bits, size, statistic_bits, weight.dtype, cost, threshold)
    sweep(dense, factor, rounder)
    return rounder.result(table)
