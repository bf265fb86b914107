"""ZeroQuant's layer-by-layer distillation: each block of a rounded model learns from the same block of the dense one.

For block k the loss is ‖L_k(x) - L̃_k(x)‖², where x is what the dense blocks before make of the text: teacher and student get the same
inputs, and only one block is in training at a time. The weights themselves are learned and rounded to nearest in each step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slimbench.methods.base import DENSE, Citation
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.quantization.solvers.reconstructing import Reconstructing

if TYPE_CHECKING:
    from torch import nn

    from slimbench.methods.kernels.grid import Grid
    from slimbench.methods.quantization.solvers.learned import LearnedLinear


@dataclass(frozen=True)
class ZeroQuantLKD(Reconstructing):
    """Weights in groups; activations keep their dtype, where the paper rounds them to 8 bits by token.

    Attributes:
        symmetric: Centre the grid on zero; else fit it to both ends of the group.
    """

    name = "zeroquant-lkd"
    accepts = DENSE
    citation = Citation("ZeroQuant LKD", year=2022, arxiv="2206.01861", covers=("quantization/zeroquant-layer-by-layer-kd",))
    scope = "dense block"

    symmetric: bool = True
    learning_rate: float = 5e-6

    @property
    def weight_grid(self) -> str:
        return uniform_grid(self.symmetric)

    def learner(self, source: nn.Linear, grid: Grid) -> LearnedLinear:
        from slimbench.methods.quantization.solvers.learned import DistilledLinear

        return DistilledLinear(source, grid, self.symmetric)
