"""AdaRound: learn for each weight whether it goes to the point of its grid above or below.

On a grid whose scale is fitted to the weights and then fixed, w̃ = s · clip(⌊w / s⌋ + h(v)) with the rectified sigmoid

    h(v) = clip(σ(v) (ζ - γ) + γ, 0, 1),    ζ = 1.1,  γ = -0.1

and v minimises, layer after layer, ‖W x - W̃ x̂‖² + λ Σ (1 - |2 h(v) - 1|^β), x̂ being the inputs that the rounded layers before give.
β falls from 20 to 2, which drives each h to 0 or 1.
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
class AdaRound(Reconstructing):
    """One layer after the other, with the paper's asymmetric reconstruction: dense outputs, inputs of the rounded model.

    The two terms are made comparable whatever the size of a layer and of its inputs: the error counts as a fraction of that of
    rounding to nearest, the penalty as a mean over weights.

    Attributes:
        symmetric: Centre the grid on zero; else fit it to both ends of the group.
        penalty: λ, which drives each weight to one of its two neighbours; for terms of that size.
    """

    name = "adaround"
    accepts = DENSE
    citation = Citation("AdaRound", year=2020, arxiv="2004.10568", covers=("quantization/adaround",))
    scope = "layer"

    symmetric: bool = True
    penalty: float = 0.3
    steps: int = 10_000
    samples: int = 1
    learning_rate: float = 1e-2

    @property
    def weight_grid(self) -> str:
        return uniform_grid(self.symmetric, "searched")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.penalty <= 0:
            raise ValueError(f"penalty must be positive, not {self.penalty}: without it weights stay between the points of the grid")

    def learner(self, source: nn.Linear, grid: Grid) -> LearnedLinear:
        from slimbench.methods.quantization.solvers.learned import UpOrDownLinear

        return UpOrDownLinear(source, grid, self.symmetric, self.penalty)
