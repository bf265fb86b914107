"""OmniQuant's learnable weight clipping: the range of each group is learned from the outputs of its block.

With γ, β in (0, 1), sigmoids of what is learned, a group of weights lies on the grid

    h = (γ max w - β min w) / (2^b - 1),    z = -⌊β min w / h⌉,    q = clip(⌊w / h⌉ + z, 0, 2^b - 1),    w̃ = h (q - z)

and γ, β are moved by the gradient of ‖F(w, X) - F(w̃, X̃)‖² for the block F, its dense inputs X and those X̃ of the rounded blocks before.
On a symmetric grid h = 2 max(γ max w, -β min w) / (2^b - 1), and z is the middle code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slimbench.methods.base import DENSE, Citation
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.settings import FittedGrid
from slimbench.methods.quantization.solvers.reconstructing import Reconstructing

if TYPE_CHECKING:
    from torch import nn

    from slimbench.methods.kernels.grid import Grid
    from slimbench.methods.quantization.solvers.learned import LearnedLinear


@dataclass(frozen=True)
class OmniQuant(FittedGrid, Reconstructing):
    """Clipping alone, as the paper has it for weights: its equivalent transformations serve activations and are left out.

    The defaults are those of the paper: 20 epochs over 128 samples, one sample a step.
    """

    name = "omniquant"
    accepts = DENSE
    least_steps = 2560  # the paper's
    citation = Citation("OmniQuant", year=2023, arxiv="2308.13137", covers=("quantization/omniquant",))

    steps: int = 2560
    samples: int = 1
    learning_rate: float = 5e-3

    @property
    def weight_grid(self) -> str:
        return uniform_grid(bool(self.symmetric), "learned")

    def learner(self, source: nn.Linear, grid: Grid) -> LearnedLinear:
        from slimbench.methods.quantization.solvers.learned import ClippedLinear

        return ClippedLinear(source, grid, bool(self.symmetric))
