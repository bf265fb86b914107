"""SpQR: small groups rounded with second-order information, and the few weights that resist kept apart in 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.layers import block_linears, check_calibration, check_groups
from slimbench.methods.core.settings import Grouped, SecondOrder


@dataclass(frozen=True)
class SpQR(Grouped, SecondOrder, Method):
    """Columns are rounded in order. When a group is reached, the outliers among its weights are found first: those without which the
    squared error of the group's other weights on a grid of their own, with the weight's own error, falls by more than a threshold. The
    error of weight j counts (w_j - q_j)² / [F⁻¹]_jj, F the Hessian of the columns that are still free: what it costs the outputs
    after the others have made up for it. The grid is then made without the outliers.

    The threshold is, for each layer, the one that `outlier_fraction` of its original weights exceed; the paper sets it by hand. The
    second level of the paper, 3-bit scales of scales, is left out: the packed format stores scales in the model's dtype. An outlier takes
    48 bits with its position. Weight only; embeddings and output head keep their dtype.

    Attributes:
        bits: Bits of a weight, before scales.
        group_size: Consecutive inputs that share one scale. The paper's own groups have 16, the smallest of the format 32.
        outlier_fraction: Share of a layer's weights that the threshold keeps apart, 0..0.1.
        symmetric: Centre the grid on zero; else fit it to both ends of the range, at 16 more bits for each group.
        clip: Search the range of each group that has the least squared rounding error; else from the smallest to the largest weight.
    """

    name = "spqr"
    accepts = DENSE
    citation = Citation("SpQR", year=2023, arxiv="2306.03078", covers=("quantization/spqr",))
    needs = Needs(calibration=True)
    produces = "packed"

    bits: Literal[2, 3, 4] = 3
    group_size: Literal[32, 64] = 32
    outlier_fraction: float = 0.01
    symmetric: bool = True
    clip: bool = True

    @property
    def weight_grid(self) -> str:
        return uniform_grid(self.symmetric, "searched" if self.clip else "min-max")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.outlier_fraction <= 0.1:
            raise ValueError(f"outlier_fraction must be above 0 and at most 0.1, not {self.outlier_fraction}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.formats import packed
        from slimbench.methods.quantization.grids.outliers import quantize
        from slimbench.methods.quantization.solvers.blockwise import Tally, quantize_blocks

        calibration = check_calibration(calibration, dense.shape)
        model = dense.load()
        check_groups(block_linears(model), self.group_size)
        grid, tally = packed.Grid(self.bits, self.group_size), Tally()
        weights = quantize_blocks(
            model,
            calibration.ids,
            lambda _, weight, moments: quantize(weight, moments, grid, self.dampening, self.outlier_fraction, self.symmetric, self.clip),
            dense.progress,
        )
        packed.save(model, tally.count(weights), out)
        details = {"symmetric": self.symmetric} | tally.details()
        return Claim(self.produces, bits=self.bits, group_size=self.group_size, details=details)
