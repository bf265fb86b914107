"""GPTAQ: GPTQ whose layers aim at what the uncompressed model computes, not at what they would make of their own, drifted inputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.layers import block_linears, check_calibration, check_groups
from slimbench.methods.core.settings import Coded, Grouped, SecondOrder

if TYPE_CHECKING:
    from slimbench.methods.core.second_order import Solver


@dataclass(frozen=True)
class GPTAQ(Coded, Grouped, SecondOrder, Method):
    """Asymmetric calibration: min over Q of ‖Q X - W X̃‖², X̃ the inputs of the uncompressed model, X those of the quantized one.

    The residual W (X̃ - X) is spread column by column through the inverse Hessian, see `methods.core.second_order`. Layers
    that share their inputs are quantized together and seen by those after them, within a block too. Weight only; embeddings and
    output head keep their dtype.

    Attributes:
        bits: Bits of a weight, before scales.
        symmetric: Centre the grid on zero; else fit it to both ends of the range.
        clip: Search the range of each group that has the least squared rounding error; else from the smallest to the largest weight.
        act_order: Treat the inputs with the largest activations first, with grids made before; else make each grid when it is reached.
        strength: Share of the residual that is made up for, 0..1; 0 is GPTQ, a quarter what the authors' program takes.
    """

    name = "gptaq"
    accepts = DENSE
    citation = Citation("GPTAQ", year=2025, arxiv="2504.02692")
    needs = Needs(calibration=True)
    produces = "packed"

    bits: Literal[2, 3, 4, 8] = 4
    symmetric: bool = True
    clip: bool = True
    act_order: bool = True
    strength: float = 0.25

    @property
    def weight_grid(self) -> str:
        return uniform_grid(self.symmetric, "searched" if self.clip else "min-max")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength must be between 0 and 1, not {self.strength}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.second_order import quantize
        from slimbench.methods.formats import packed
        from slimbench.methods.quantization.solvers.blockwise import quantize_blocks

        calibration = check_calibration(calibration, dense.shape)
        model = dense.load()
        check_groups(block_linears(model), self.group_size)
        grid, solver = packed.Grid(self.bits, self.group_size), self.solver()
        weights = quantize_blocks(
            model,
            calibration.ids,
            lambda _, weight, moments: quantize(weight, moments, grid, solver, self.symmetric, self.clip),
            dense.progress,
            drift=self.strength > 0,
        )
        packed.save(model, weights, out)
        details = {"symmetric": self.symmetric, "act_order": self.act_order, "strength": self.strength}
        return Claim(self.produces, bits=self.bits, group_size=self.group_size, details=details)

    def solver(self) -> Solver:
        """How the columns of a layer are gone through."""
        from slimbench.methods.core.second_order import Solver

        return Solver(self.act_order, self.dampening, self.strength)
