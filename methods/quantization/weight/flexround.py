"""FlexRound: learn what each weight is divided by before it is rounded to nearest.

    w̃ = s₁ ⌊w / (s₁ ⊙ S₂ ⊙ s₃)⌉

s₁ is the scale of the grid, S₂ has one entry for each weight and s₃ one for each output; all are positive and learned together from the
outputs of the block. The gradient of an entry of S₂ is proportional to its weight, so large weights may move by more than one
step and small ones hardly do, which a learned choice between up and down cannot give.
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
class FlexRound(Reconstructing):
    """Block by block; the paper has one grid a row, here it may be one a group.

    Attributes:
        symmetric: Centre the grid on zero; else fit it to both ends of the group, with an offset that is not learned.
    """

    name = "flexround"
    accepts = DENSE
    citation = Citation("FlexRound", year=2023, arxiv="2306.00317", covers=("quantization/flexround",))

    symmetric: bool = True
    steps: int = 5000
    samples: int = 2
    learning_rate: float = 2e-3

    @property
    def weight_grid(self) -> str:
        return uniform_grid(self.symmetric, "learned")

    def learner(self, source: nn.Linear, grid: Grid) -> LearnedLinear:
        from slimbench.methods.quantization.solvers.learned import DividedLinear

        return DividedLinear(source, grid, self.symmetric)
