"""Gradual magnitude pruning: the smallest weights go while the model learns, ever more of them, until the sparsity is reached.

After the step t, of those from t₀ to t₁, the smallest |w| are set to zero, so that the share of zeros is (Zhu and Gupta, arXiv 1710.01878)

    s_t = s_f + (s_i − s_f) (1 − (t − t₀) / (t₁ − t₀))³

of each layer, or of all layers together by one threshold. Masks are chosen anew every few steps; between two choices a weight that is
zero has no gradient, no moment and no decay. Gordon et al. (arXiv 2002.08307) prune BERT so before it is fine-tuned. GMP★ (arXiv
2210.06384) is the same with a first step to an s_i of 50 to 70 %, one threshold for all layers, the teacher's distribution at a temperature
as the only target, and a learning rate that begins anew after each choice:

    η_t = η (1 − 0.99 t / t₀)  before t₀,    η (1 − 0.5 ((t − t₀) mod Δt) / Δt)  up to t₁,    η (1 − 0.99 (t − t₁) / (T − t₁))  afterwards

The numbers of the rate, the teacher alone as the target and the temperature 5 are those of a recipe that the same authors gave for oBERT;
the paper's own table was not at hand.
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


@dataclass(frozen=True)
class GMPStar(GradualMagnitude):
    """GMP★: well-tuned pruning by magnitude; the learning rate has the course above.

    Attributes:
        teacher_temperature: τ of both distributions; the loss is τ² times their cross entropy.
    """

    name = "gmp-star"
    citation = Citation("GMP★", year=2022, arxiv="2210.06384", covers=("pruning/gmp-b",))

    initial: float = 0.7
    scope: Literal["layer", "model"] = "model"
    loss: Literal["distillation"] = "distillation"
    learning_rate: float = 5e-4
    schedule: Literal["linear"] = "linear"
    warmup: float = 0.0
    teacher_temperature: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup:
            raise ValueError(f"warmup must be 0, not {self.warmup}: the rate has a course of its own")
        if not self.teacher_temperature > 0:
            raise ValueError(f"teacher_temperature must be positive, not {self.teacher_temperature}")

    def rate(self, step: int) -> float:
        begin, end = self.cubic.begin, self.cubic.end
        if step < begin:
            fallen = 0.99 * step / begin
        elif step < end:
            fallen = 0.5 * ((step - begin) % self.every) / self.every
        else:
            fallen = 0.99 * (step - end) / (self.steps - end)
        return self.learning_rate * (1 - fallen)


class Magnitudes(Growing):
    """Weights of the lowest magnitude go."""

    def scores(self) -> Mapping[str, Tensor]:
        return {name: value.detach().abs() for name, value in self.parameters.items()}
