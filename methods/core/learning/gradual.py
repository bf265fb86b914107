"""Sparsity that grows while a model learns: how much of it there is after a step, and masks that are chosen anew as it grows.

Of the steps from `begin` to `end` the share of zeros is (Zhu and Gupta, arXiv 1710.01878)

    s_t = s_f + (s_i − s_f) (1 − (t − begin) / (end − begin))³

before them it is s_i, after them s_f. It rises fast where there is much to spare, and slowly at last.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from slimbench.methods.core.learning.hooks import Locked
from slimbench.methods.core.masks import across, choose

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Cubic:
    """A share that goes from one value to another.

    Attributes:
        initial: s_i.
        final: s_f.
        begin: The last step with s_i.
        end: The first step with s_f.
    """

    initial: float
    final: float
    begin: int
    end: int

    def at(self, step: int) -> float:
        """The share after that many steps."""
        done = (step - self.begin) / max(1, self.end - self.begin)
        return float(self.final + (self.initial - self.final) * (1 - min(1.0, max(0.0, done))) ** 3)


@dataclass
class Growing(Locked):
    """Weights that go while the others learn; those that have gone are locked until masks are chosen anew.

    Attributes:
        schedule: The share of zeros among all masked parameters.
        every: Steps between two choices; there is one at the end of the schedule too.
        scope: Among which weights scores are compared: those of an output, of a layer, or of all layers.
        pattern: `n:m`, with the scopes `row` and `layer`: all runs hold it from the first choice on.
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    schedule: Cubic = field(kw_only=True)
    every: int = field(kw_only=True, default=1)
    scope: Literal["row", "layer", "model"] = field(kw_only=True, default="model")
    pattern: str | None = field(kw_only=True, default=None)

    @abstractmethod
    def scores(self) -> Mapping[str, Tensor]:
        """How much each weight matters, by parameter: the lowest go."""

    def choose(self, share: float) -> dict[str, Tensor]:
        """Masks of that share of zeros, to the weight; true where one goes."""
        scores = self.scores()
        if self.scope == "model":
            return across(scores, round(share * sum(values.numel() for values in scores.values())))
        return {name: choose(values, round(share * values.numel()), self.scope, self.pattern) for name, values in scores.items()}

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        done = step + 1
        if done == self.schedule.end or (
            self.schedule.begin <= done < self.schedule.end and (done - self.schedule.begin) % self.every == 0
        ):
            self.masks = self.choose(self.schedule.at(done))
        super().after_step(step, optimizer)


def straight_through(weight: Tensor, kept: Tensor, scores: Tensor) -> Tensor:
    """W ⊙ M, through which scores get the gradient ∂L/∂S = ∂L/∂(W ⊙ M) ⊙ W, of kept and of pruned weights alike; W gets that of M alone.

    Args:
        weight: W [out, in].
        kept: M, of the weight's dtype, 1 where a weight stays.
        scores: S, of which M was made.
    """
    return weight * (kept + (scores - scores.detach()))
