"""Gradual magnitude pruning: the smallest weights go while the model learns, ever more of them, until the sparsity is reached.

After the step t, of those from t₀ to t₁, the smallest |w| are set to zero, so that the share of zeros is (Zhu and Gupta, arXiv 1710.01878)

    s_t = s_f + (s_i − s_f) (1 − (t − t₀) / (t₁ − t₀))³

of each layer, or of all layers together by one threshold. Masks are chosen anew every few steps; between two choices a weight that is
zero has no gradient, no moment and no decay. Gordon et al. (arXiv 2002.08307) prune BERT so before it is fine-tuned. GMP★ (arXiv
2210.06384) is the same with s_i of 50 to 70 %, the teacher's distribution as the only target and a tuned learning rate; its rewinds of
the rate and its temperature are not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import Citation
from slimbench.methods.core.learning.gradual import Cubic, Growing
from slimbench.methods.pruning.training.sparse import SparseTraining

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class GradualMagnitude(SparseTraining):
    """Pruning by magnitude in the course of training.

    Attributes:
        initial: s_i, from 0 to below the sparsity.
        begin: t₀ as a share of the steps.
        end: t₁ as a share of the steps; what is left trains under the last masks.
        every: Steps between two choices of masks.
        scope: Among which weights magnitudes are compared: each layer has the same sparsity, or one threshold holds for all.
    """

    name = "gmp"
    citation = Citation("GMP", year=2017, arxiv="1710.01878", covers=("pruning/gmp",))
    least_steps = 1000

    initial: float = 0.0
    begin: float = 0.1
    end: float = 0.8
    every: int = 2
    scope: Literal["layer", "model"] = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.initial < self.sparsity:
            raise ValueError(f"initial must be from 0 to below the sparsity {self.sparsity}, not {self.initial}")
        if not 0 <= self.begin < self.end <= 1:
            raise ValueError(f"begin and end must be shares of the steps, the first below the second, not {self.begin} and {self.end}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1, not {self.every}")
        if self.cubic.begin == self.cubic.end:
            raise ValueError(f"no step of {self.steps} lies between {self.begin} and {self.end} of them")

    @property
    def cubic(self) -> Cubic:
        """s_t, by steps."""
        return Cubic(self.initial, self.sparsity, round(self.begin * self.steps), round(self.end * self.steps))

    def hooks(self, weights: Mapping[str, nn.Parameter], parameters: Mapping[str, nn.Parameter]) -> Magnitudes:
        return Magnitudes(weights, schedule=self.cubic, every=self.every, scope=self.scope)


class Magnitudes(Growing):
    """Weights of the lowest magnitude go."""

    def scores(self) -> Mapping[str, Tensor]:
        return {name: value.detach().abs() for name, value in self.parameters.items()}
