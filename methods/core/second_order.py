"""Rounding with second-order information: one column after the other, the error of each fed into those that are still free.

For a layer with weights W [out, in] and inputs X [in, n], the squared error of the outputs ‖(W - Q) X‖² of a row is a quadratic form
in its weights with the Hessian H = 2 X Xᵀ / n. Where column j is rounded and those before it are fixed, the error of the outputs is
least if the columns after it are changed by

    - (w_j - q_j) / [F⁻¹]_jj · F⁻¹_j,        F: the part of H that belongs to column j and those after it

which is the step of Optimal Brain Quantization in a fixed order, as GPTQ (arXiv 2210.17323) takes it for all rows at once. With the
upper Cholesky factor U of the inverse, H⁻¹ = Uᵀ U, that row is (w_j - q_j) / U_jj · U_j for every j. Columns go in blocks: inside a
block the change is made at once, beyond it once a block.

Where the layer shall give what the uncompressed model gives it, for inputs X̃ of that model, the residual W ΔX, ΔX = X̃ - X, is
spread too (GPTAQ, arXiv 2504.02692): when column j is rounded, the columns after it take up what it contributes, w_j ΔX_j, by least
squares,

    + w_j · P_j,   P_j = ΔX_j X_Fᵀ (X_F X_Fᵀ)⁻¹,   F: the columns after j,   so P = striu(D Uᵀ) U   with   D = 2 ΔX Xᵀ / n

(striu: what is above the diagonal).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slimbench.methods.kernels.grid import Grid, Outliers, QuantizedWeight
from slimbench.methods.kernels.rounding import fit_groups, nearest_codes

BLOCK = 128
_PRUNED = 0.05

Rounder = Callable[[int, Tensor], Tensor]
"""Called with the place of a column in the order and with the columns from there on, [columns, out]; returns the first, rounded.

Those that belong to the same group of the order are up to date; those further on may not be.
"""


@dataclass
class Moments:
    """Second moments of the inputs of a layer.

    Attributes:
        hessian: 2 X Xᵀ / n, float32 [in, in].
        drift: 2 ΔX Xᵀ / n, float32 [in, in], where ΔX is what the uncompressed model's inputs have more; None if nobody asked.
        tokens: n.
    """

    hessian: Tensor
    drift: Tensor | None = None
    tokens: int = 0

    @classmethod
    def zeros(cls, inputs: int, device: torch.device, drift: bool = False) -> Moments:
        def empty() -> Tensor:
            return torch.zeros(inputs, inputs, device=device)

        return cls(empty(), empty() if drift else None)

    def add(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Take in inputs [tokens, in], and those of the uncompressed model for the same tokens."""
        if not len(x):
            return
        x, total = x.float(), self.tokens + len(x)
        self.hessian.mul_(self.tokens / total).addmm_(x.t(), x, alpha=2 / total)
        if self.drift is not None and dense is not None:
            self.drift.mul_(self.tokens / total).addmm_((dense.float() - x).t(), x, alpha=2 / total)
        self.tokens = total


@dataclass(frozen=True)
class Solver:
    """How the columns are gone through.

    Attributes:
        act_order: Columns with the largest inputs first. Groups stay consecutive inputs, so their grids come from the weights as they
            were; else each grid comes from the weights as they are when its group is reached.
        dampening: Added to the Hessian's diagonal, as a fraction of its mean.
        strength: Share of the drift that is made up for, 0..1.
    """

    act_order: bool = True
    dampening: float = 0.01
    strength: float = 0.0

    def __post_init__(self) -> None:
        if self.dampening <= 0:
            raise ValueError(f"dampening must be positive, not {self.dampening}")
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength must be between 0 and 1, not {self.strength}")

    def order(self, hessian: Tensor, last: Tensor | None = None) -> Tensor:
        """The order of the columns, int64 [in]. Those under the boolean mask `last` [in] come at the end."""
        key = -hessian.diagonal() if self.act_order else torch.arange(len(hessian), device=hessian.device, dtype=hessian.dtype)
        order = torch.argsort(key, stable=True)
        return order if last is None else torch.cat((order[~last[order]], order[last[order]]))


def inverse_factor(hessian: Tensor, dampening: float) -> Tensor:
    """The upper triangular U with Uᵀ U = (H + λ I)⁻¹, float32; factored in float64.

    λ is `dampening` times the mean of the diagonal, and is made ten times larger as often as the factorisation fails. Inputs that
    were always zero get a one: no other weight can make up for theirs.
    """
    wanted = hessian.double()
    diagonal = wanted.diagonal()
    diagonal[diagonal == 0] = 1
    damping = dampening * float(diagonal.mean())
    while True:
        lower, failed = torch.linalg.cholesky_ex(wanted + damping * torch.eye(len(wanted), dtype=wanted.dtype, device=wanted.device))
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(upper.isfinite().all()):
                return upper.float()
        if not damping < float("inf"):
            raise RuntimeError("the Hessian has no inverse: calibration gave inputs that are not finite")
        damping *= 10


def drift_rows(drift: Tensor, factor: Tensor) -> Tensor:
    """P = striu(D Uᵀ) U: row j says what the columns after j take up for each unit of w_j."""
    return torch.triu(drift @ factor.t(), diagonal=1) @ factor


def sweep(weight: Tensor, factor: Tensor, rounder: Rounder, drift: Tensor | None = None, block: int = BLOCK) -> Tensor:
    """Round the columns of a weight in their order.

    Args:
        weight: float32 [out, in], columns in the order in which they are rounded.
        factor: U, in the same order.
        drift: P, in the same order.
        block: Columns after which the rest is brought up to date.

    Returns:
        The rounded weight [out, in], in that order.
    """
    work = weight.t().contiguous()
    inputs = len(work)
    scale = factor.diagonal().tolist()
    for begin in range(0, inputs, block):
        end = min(begin + block, inputs)
        errors = torch.empty_like(work[begin:end])
        before = torch.empty_like(errors) if drift is not None else None
        for column in range(begin, end):
            rounded = rounder(column, work[column:])
            error = errors[column - begin] = (work[column] - rounded) / scale[column]
            later = work[column + 1 : end]
            if before is not None and drift is not None:
                before[column - begin] = work[column]
                later.addr_(drift[column, column + 1 : end], work[column])
            later.addr_(factor[column, column + 1 : end], error, alpha=-1)
            work[column] = rounded
        work[end:].addmm_(factor[begin:end, end:].t(), errors, alpha=-1)
        if before is not None and drift is not None:
            work[end:].addmm_(drift[begin:end, end:].t(), before)
    return work.t()


class GridRounder:
    """Rounds to the nearest point of a uniform grid for each group of inputs, and collects the codes.

    Args:
        weight: float32 [out, in], in the order of the inputs.
        order: Order in which the columns come.
        dtype: Of scales and offsets.
        clip: Search the range of each group for the least squared rounding error.
        static: All grids come from `weight`; else each from the columns as they are when its group is reached, which then must
            be the next columns of the order.
        apart: Boolean [out, in]; weights that are kept beside the grid, in `dtype`, and have no part in fitting it.
        zeros: Boolean [out, in]; weights that stay exactly zero. Symmetric grids only.
    """

    def __init__(
        self,
        weight: Tensor,
        order: Tensor,
        grid: Grid,
        dtype: torch.dtype,
        symmetric: bool = True,
        clip: bool = True,
        static: bool = True,
        apart: Tensor | None = None,
        zeros: Tensor | None = None,
    ) -> None:
        self.grid, self.dtype, self.symmetric, self.clip, self.static = grid, dtype, symmetric, clip, static
        self.columns: list[int] = order.tolist()
        outputs, inputs = weight.shape
        self.size = grid.group_size or inputs
        self.codes = torch.zeros(inputs, outputs, dtype=torch.int8 if grid.bits == 8 else torch.uint8, device=weight.device)
        self.kept = torch.zeros(inputs, outputs, device=weight.device)
        self.apart = None if apart is None else apart.t().contiguous()
        self.zeros = None if zeros is None else zeros.t().contiguous()
        self.scales = torch.ones(inputs // self.size, outputs, dtype=dtype, device=weight.device)
        self.offsets = None if symmetric else torch.zeros_like(self.scales)
        if static:
            for group in range(len(self.scales)):
                self.fit(group, weight[:, group * self.size : (group + 1) * self.size])

    def fit(self, group: int, weights: Tensor) -> None:
        """Make the grid of a group from its weights [out, size]."""
        if self.apart is not None:
            mask = self.apart[group * self.size : (group + 1) * self.size].t()
            count = (~mask).sum(1, keepdim=True).clamp_min(1)
            middle = torch.where(mask, 0.0, weights).sum(1, keepdim=True) / count
            weights = torch.where(mask, middle.expand_as(weights), weights)
        scales, offsets = fit_groups(weights, self.grid.bits, self.dtype, self.symmetric, self.clip)
        self.scales[group] = scales
        if self.offsets is not None and offsets is not None:
            self.offsets[group] = offsets

    def __call__(self, place: int, pending: Tensor) -> Tensor:
        column = self.columns[place]
        group = column // self.size
        if not self.static and column % self.size == 0:
            self.fit(group, pending[: self.size].t())
        values, scales = pending[0], self.scales[group]
        offsets = None if self.offsets is None else self.offsets[group]
        on_grid = values if self.apart is None else values.masked_fill(self.apart[column], 0.0)
        codes = nearest_codes(on_grid.unsqueeze(-1), scales, offsets, self.grid).squeeze(-1)
        if self.zeros is not None:
            codes = codes.masked_fill(self.zeros[column], self.grid.mid)
        self.codes[column] = codes
        rounded = (codes.float() - self.grid.mid) * scales.float()
        if offsets is not None:
            rounded = rounded + offsets.float()
        if self.apart is not None:
            rest = torch.where(self.apart[column], values - rounded, 0.0).to(self.dtype).float()
            self.kept[column] = rest
            rounded = rounded + rest
        return rounded

    def result(self) -> QuantizedWeight:
        """The weight, once all columns have been rounded."""
        offsets = None if self.offsets is None else self.offsets.t().contiguous()
        outliers = None if self.apart is None else Outliers.of(self.kept.t().to(self.dtype), self.apart.t())
        return QuantizedWeight(self.grid, self.codes.t().contiguous(), self.scales.t().contiguous(), offsets, outliers)


def quantize(
    weight: Tensor, moments: Moments, grid: Grid, solver: Solver, symmetric: bool = True, clip: bool = True, keep: Tensor | None = None
) -> QuantizedWeight:
    """Quantize a weight [out, in] of the model's dtype.

    In a weight with more than 5 % zeros, which pruning has made, zeros stay zero on a symmetric grid.

    Args:
        keep: Boolean [in]; columns that are kept beside the grid. They come last and take up the error of all others.
    """
    dense = weight.float()
    order = solver.order(moments.hessian, keep)
    rounder = GridRounder(
        dense,
        order,
        grid,
        weight.dtype,
        symmetric,
        clip,
        static=solver.act_order or keep is not None,
        apart=None if keep is None else keep.expand_as(dense),
        zeros=pruned(dense) if symmetric else None,
    )
    run(dense, moments, solver, order, rounder)
    return rounder.result()


def pruned(weight: Tensor) -> Tensor | None:
    """The zeros of a weight as a boolean mask, if they are so many that pruning has made them; else None."""
    zeros = weight == 0
    return zeros if float(zeros.float().mean()) > _PRUNED else None


def run(weight: Tensor, moments: Moments, solver: Solver, order: Tensor, rounder: GridRounder, factor: Tensor | None = None) -> Tensor:
    """Sweep over a float32 weight [out, in] in an order of its columns; returns it rounded, in the order of the inputs."""
    if factor is None:
        factor = inverse_factor(moments.hessian[order][:, order], solver.dampening)
    drift = None
    if solver.strength and moments.drift is not None:
        drift = drift_rows(solver.strength * moments.drift[order][:, order], factor)
    block = max(BLOCK, rounder.size) if rounder.size < weight.shape[1] else BLOCK
    rounded = torch.empty_like(weight)
    rounded[:, order] = sweep(weight[:, order], factor, rounder, drift, block)
    return rounded
