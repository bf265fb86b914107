"""OWQ: GPTQ, but the few input columns whose rounding would cost the outputs most keep 16 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.layers import block_linears, check_calibration, check_groups
from slimbench.methods.core.settings import Coded, Grouped, SecondOrder

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.core.second_order import Moments


@dataclass(frozen=True)
class OWQ(Coded, Grouped, SecondOrder, Method):
    """Weak columns are those with the largest λ_j ‖ΔW_j‖²: λ_j the diagonal of the Hessian, ΔW_j the rounding error of column j.

    They have no part in the grids, come last, and so take up the error of all other columns before they are stored. As in the paper
    each row has one grid, with an offset, in the range that is best for its weights (by squared errors here, by the power 2.4 in the
    authors' program). The packed format holds single weights beside the grid, each with the 32 bits of its position, so that a column
    of 16-bit weights costs 48 bits a weight here, where the paper's own layout needs 16. Weight only; embeddings and output head keep
    their dtype.

    Attributes:
        bits: Bits of the weights in all other columns, before scales.
        group_size: Consecutive inputs that share one scale; None for one scale a row, as in the paper.
        column_fraction: Share of the columns of each layer that keep 16 bits, rounded up to whole columns, 0..0.5.
        symmetric: Centre the grid on zero; else fit it to both ends of the range.
        clip: Search the range of each group that has the least squared rounding error; else from the smallest to the largest weight.
        act_order: Treat the inputs with the largest activations first.
    """

    name = "owq"
    accepts = DENSE
    citation = Citation("OWQ", year=2023, arxiv="2306.02272", covers=("quantization/owq",))
    needs = Needs(calibration=True)
    produces = "packed"

    bits: Literal[2, 3, 4] = 3
    group_size: Literal[32, 64, 128, 256] | None = None
    column_fraction: float = 0.0075
    symmetric: bool = False
    clip: bool = True
    act_order: bool = True

    @property
    def weight_grid(self) -> str:
        return uniform_grid(self.symmetric, "searched" if self.clip else "min-max")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.column_fraction <= 0.5:
            raise ValueError(f"column_fraction must be above 0 and at most 0.5, not {self.column_fraction}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.second_order import Solver, quantize
        from slimbench.methods.formats import packed
        from slimbench.methods.quantization.solvers.blockwise import Tally, quantize_blocks

        calibration = check_calibration(calibration, dense.shape)
        model = dense.load()
        check_groups(block_linears(model), self.group_size)
        grid, solver, tally = packed.Grid(self.bits, self.group_size), Solver(self.act_order, self.dampening), Tally()
        weights = quantize_blocks(
            model,
            calibration.ids,
            lambda _, weight, moments: quantize(
                weight, moments, grid, solver, self.symmetric, self.clip, self.weak_columns(weight, moments)
            ),
            dense.progress,
        )
        packed.save(model, tally.count(weights), out)
        details = {"symmetric": self.symmetric, "act_order": self.act_order} | tally.details()
        return Claim(self.produces, bits=self.bits, group_size=self.group_size, details=details)

    def weak_columns(self, weight: Tensor, moments: Moments) -> Tensor:
        """The columns of a weight [out, in] that keep 16 bits, as a boolean mask [in]."""
        import torch

        from slimbench.methods.kernels.grid import Grid
        from slimbench.methods.kernels.rounding import round_to_grid

        rounded = round_to_grid(weight, Grid(self.bits, self.group_size), self.symmetric, self.clip).dequantize()
        cost = moments.hessian.diagonal() * (rounded.float() - weight.float()).square().sum(0)
        weak = torch.zeros_like(cost, dtype=torch.bool)
        weak[cost.topk(math.ceil(self.column_fraction * len(cost))).indices] = True
        return weak
