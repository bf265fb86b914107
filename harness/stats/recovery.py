"""How much of its reference's quality a candidate keeps: a ratio with one-sided bounds, and what would decide whether it is enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy import optimize

from slimbench.harness.stats.bootstrap import UNDEFINED, Interval, Samples
from slimbench.harness.stats.losses import AnswerLoss, Loss, MeanLoss

_LEAST, _MOST = 1e-9, 1e9
"""Ratios beyond which no bound is looked for."""


@dataclass(frozen=True)
class Recovery:
    """A ratio to the reference, 1 where nothing is lost.

    Attributes:
        value: As it was measured.
        question: For a ratio, the loss and the bound below which that lies exactly where the true ratio is above.
    """

    value: float
    question: Callable[[float], tuple[Loss, float]]

    @classmethod
    def of_accuracy(cls, candidate: Sequence[Samples], reference: Sequence[Samples]) -> Recovery:
        """Macro-average accuracy of the candidate over that of the reference, on shared items.

        Args:
            candidate: For each task the correctness of its items, 0..1, shape [items]; numbers of items may differ.
            reference: The same tasks and items in the same order.

        Raises:
            ValueError: Tasks or items do not match, there are none, a value is not finite, or the reference has nothing right.

        Source: a ratio by tests of a difference, Fieller, Journal of the Royal Statistical Society B 16(2), 1954.
        """
        loss = AnswerLoss.of(candidate, reference)
        ours, theirs = (float((right / loss.items).mean()) for right in (loss.won + loss.kept, loss.lost + loss.kept))
        if not theirs:
            raise ValueError("the reference has nothing right")
        return cls(ours / theirs, lambda ratio: (AnswerLoss(loss.lost, loss.won, loss.kept, loss.items, ratio), 0.0))

    @classmethod
    def of_perplexity(cls, candidate: Samples, reference: Samples) -> Recovery:
        """Perplexity of the reference over that of the candidate, on shared windows.

        Args:
            candidate: Mean NLL of each window in nats, shape [windows].
            reference: The same windows in the same order, shape [windows].

        Raises:
            ValueError: Different numbers of windows, none, or one whose NLL is not finite.
        """
        loss = MeanLoss.of(candidate, reference)
        return cls(math.exp(-float(loss.value)), lambda ratio: (loss, -math.log(ratio)))

    def above(self, ratio: float) -> float:
        """p-value of the claim that the true ratio is above a given one."""
        loss, bound = self.question(ratio)
        return float(loss.sides(bound).below)

    def below(self, ratio: float) -> float:
        """p-value of the claim that the true ratio is below a given one."""
        loss, bound = self.question(ratio)
        return float(loss.sides(bound).above)

    def bounds(self, confidence: float) -> Interval:
        """Lower and upper bound, each with that confidence of its own: what lies below the lower one is shown to be reached.

        Returns:
            `nan` for a single window, 0 and infinity where there is no bound.
        """
        level = 1 - confidence
        if math.isnan(self.above(1.0)):
            return UNDEFINED
        return _crossing(lambda ratio: self.above(ratio) - level), _crossing(lambda ratio: level - self.below(ratio))


def _crossing(rising: Callable[[float], float]) -> float:
    """Where a rising function of a ratio passes zero."""
    if rising(_LEAST) >= 0:
        return 0.0
    if rising(_MOST) <= 0:
        return math.inf
    return math.exp(optimize.brentq(lambda log: rising(math.exp(log)), math.log(_LEAST), math.log(_MOST), xtol=1e-9))
