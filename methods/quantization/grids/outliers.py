"""Outliers by sensitivity: which weights of a group it costs most to round, and a rounder that keeps them apart (SpQR)."""

from __future__ import annotations

import torch
from torch import Tensor

from slimbench.methods.core.second_order import GridRounder, Moments, Solver, inverse_factor, pruned, run
from slimbench.methods.kernels.grid import Grid, QuantizedWeight
from slimbench.methods.kernels.rounding import fit_groups, nearest_codes

_ROWS = 1024


def gains(groups: Tensor, cost: Tensor, grid: Grid, dtype: torch.dtype, symmetric: bool) -> Tensor:
    """By how much the error of a group falls if one of its weights is left out, [out, n] for each weight of groups [out, n].

    The error of a group is the sum of `cost` [n] times the squared rounding errors, on the grid from its smallest to its largest
    weight. A weight that is left out has no error of its own, and no part in the grid of the others.
    """
    return torch.cat([_gains(part, cost, grid, dtype, symmetric) for part in groups.split(_ROWS)])


def _gains(groups: Tensor, cost: Tensor, grid: Grid, dtype: torch.dtype, symmetric: bool) -> Tensor:
    size = groups.shape[1]
    out = torch.eye(size, dtype=torch.bool, device=groups.device)
    others = (groups.sum(1, keepdim=True) - groups) / (size - 1)
    without = torch.where(out, others.unsqueeze(2), groups.unsqueeze(1))
    whole = (_squared_errors(groups, grid, dtype, symmetric) * cost).sum(1, keepdim=True)
    rest = (_squared_errors(without, grid, dtype, symmetric) * cost).masked_fill(out, 0).sum(2)
    return whole - rest


def _squared_errors(groups: Tensor, grid: Grid, dtype: torch.dtype, symmetric: bool) -> Tensor:
    scales, offsets = fit_groups(groups, grid.bits, dtype, symmetric)
    codes = nearest_codes(groups, scales, offsets, grid).float() - grid.mid
    rounded = codes * scales.float().unsqueeze(-1)
    if offsets is not None:
        rounded = rounded + offsets.float().unsqueeze(-1)
    return (groups - rounded).square()


class OutlierRounder(GridRounder):
    """Looks for the outliers of each group when it is reached, and makes its grid without them.

    Args:
        factor: U of the sweep, in the order of the inputs.
        threshold: Gain above which a weight is an outlier.
    """

    def __init__(
        self,
        weight: Tensor,
        grid: Grid,
        dtype: torch.dtype,
        factor: Tensor,
        threshold: float,
        symmetric: bool,
        clip: bool,
        zeros: Tensor | None = None,
    ) -> None:
        super().__init__(
            weight,
            torch.arange(weight.shape[1]),
            grid,
            dtype,
            symmetric,
            clip,
            static=False,
            apart=torch.zeros_like(weight, dtype=torch.bool),
            zeros=zeros,
        )
        self.cost, self.threshold = costs(factor), threshold

    def fit(self, group: int, weights: Tensor) -> None:
        place = slice(group * self.size, (group + 1) * self.size)
        found = gains(weights, self.cost[place], self.grid, self.dtype, self.symmetric) > self.threshold
        assert self.apart is not None
        self.apart[place] = found.t() if self.zeros is None else found.t() & ~self.zeros[place]
        super().fit(group, weights)


def costs(factor: Tensor) -> Tensor:
    """1 / [F⁻¹]_jj for each column, F the Hessian of it and those after it: what a squared rounding error costs the outputs."""
    return factor.diagonal().square().reciprocal()


def threshold_of(weight: Tensor, cost: Tensor, grid: Grid, size: int, dtype: torch.dtype, symmetric: bool, fraction: float) -> float:
    """The gain that a fraction of the weights [out, in] exceed, float32, in groups of `size` inputs."""
    groups = zip(weight.split(size, dim=1), cost.split(size), strict=True)
    gained = torch.cat([gains(group, price, grid, dtype, symmetric).flatten() for group, price in groups])
    return float(gained.kthvalue(max(1, round((1 - fraction) * len(gained)))).values)


def quantize(
    weight: Tensor, moments: Moments, grid: Grid, dampening: float, fraction: float, symmetric: bool = True, clip: bool = True
) -> QuantizedWeight:
    """Quantize a weight [out, in] of the model's dtype and keep about a fraction of its weights apart."""
    assert grid.group_size is not None
    dense, solver = weight.float(), Solver(act_order=False, dampening=dampening)
    factor = inverse_factor(moments.hessian, dampening)
    threshold = threshold_of(dense, costs(factor), grid, grid.group_size, weight.dtype, symmetric, fraction)
    zeros = pruned(dense) if symmetric else None
    rounder = OutlierRounder(dense, grid, weight.dtype, factor, threshold, symmetric, clip, zeros)
    run(dense, moments, solver, torch.arange(dense.shape[1], device=dense.device), rounder, factor)
    return rounder.result()
