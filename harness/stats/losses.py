"""What a candidate loses against its reference on shared items, and one-sided tests of any bound on it.

A loss is what the candidate has more of: negative log-likelihood in nats, or answers that it gets wrong as a share of the items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import special

from slimbench.harness.stats.bootstrap import Samples, paired_values


class Sides(NamedTuple):
    """p-values of the two one-sided tests of a bound: small where the true value is shown to be below it, and above it."""

    below: Any
    above: Any


class Loss(Protocol):
    """A loss over shared items, or many of the same shape."""

    @property
    def value(self) -> Any:
        """The loss that was measured, shape [...]."""

    @property
    def error(self) -> Any:
        """Its standard error, shape [...]; `nan` where it is unknown."""

    @property
    def count(self) -> int:
        """Number of items."""

    def sides(self, bound: float) -> Sides:
        """The one-sided tests of a bound in the unit of the loss, shapes [...]; `nan` where nothing can be tested."""

    def power(self, count: int, bound: float, level: float) -> float:
        """Chance that so many items show on which side of a bound the loss lies, if what was measured is the truth.

        Args:
            count: Number of items, at least two.
            bound: In the unit of the loss.
            level: At which the one-sided p-value is read.
        """


@dataclass(frozen=True)
class MeanLoss:
    """The mean of paired differences, such as those of the NLL of windows in nats.

    A p-value is the larger of Student's and of Student's after Hall's transformation, which takes out the skewness. Of losses that lie
    exactly at a bound, Student's alone shows 7.7 % to be below it where 16 differences have a skewness of 1, and 11.5 % at a skewness of 2,
    instead of 5 %; both together 5.7 % and 6.8 %, and at most 5 % where differences are symmetric, however heavy their tails.

    Attributes:
        differences: candidate - reference, shape [..., items].

    Source: Student, Biometrika 6(1), 1908; Hall, On the Removal of Skewness by Transformation, Journal of the Royal Statistical
    Society B 54(1), 1992.
    """

    differences: NDArray[np.float64]

    @classmethod
    def of(cls, candidate: Samples, reference: Samples) -> MeanLoss:
        """The loss of one value an item, shape [items]; more is worse.

        Raises:
            ValueError: Different numbers of items, none, or one that is not finite.
        """
        ours, theirs = paired_values(candidate, reference)
        return cls(ours - theirs)

    @cached_property
    def value(self) -> Any:
        return self.differences.mean(axis=-1)

    @cached_property
    def error(self) -> Any:
        if self.count < 2:
            return np.full(self.differences.shape[:-1], math.nan)
        return self.differences.std(axis=-1, ddof=1) / math.sqrt(self.count)

    @property
    def count(self) -> int:
        return self.differences.shape[-1]

    def sides(self, bound: float) -> Sides:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            student = np.where(self.value == bound, 0.0, (self.value - bound) / self.error)
            skew = self._skewness / math.sqrt(self.count)
            hall = student + skew * student**2 / 3 + skew**2 * student**3 / 27 + skew / 6
        hall = np.where(np.isfinite(hall), hall, student)
        tails = (np.maximum(*special.stdtr(self.count - 1, np.stack([sign * student, sign * hall]))) for sign in (1, -1))
        return Sides(*tails)

    def power(self, count: int, bound: float, level: float) -> float:
        """As of `Loss`: the non-central t distribution of Student's test."""
        distance = abs(float(self.value) - bound) * math.sqrt(count / self.count)
        if not self.error:
            return float(distance > 0)
        return float(1 - special.nctdtr(count - 1, distance / self.error, special.stdtrit(count - 1, 1 - level)))

    @property
    def _skewness(self) -> Any:
        """Of the differences, corrected for their number; 0 where they do not vary or are fewer than three."""
        if self.count < 3:
            return np.zeros(self.differences.shape[:-1])
        cubes = ((self.differences - np.expand_dims(self.value, -1)) ** 3).sum(axis=-1)
        skewness = cubes / (self.error * math.sqrt(self.count)) ** 3 * self.count / ((self.count - 1) * (self.count - 2))
        return np.nan_to_num(skewness, posinf=0.0, neginf=0.0)


@dataclass(frozen=True)
class AnswerLoss:
    """What is missing of the reference's macro-average accuracy: tasks are fixed and weigh the same, items within a task are independent.

    The loss is `share` · accuracy(reference) - accuracy(candidate), after one more answer has turned right and one wrong, shared between
    the tasks. A bound is tested with the standard error that the loss would have if the bound were the truth, from the likeliest numbers
    of changed answers that fit it: with the one that was measured, up to 9 % of losses of 3 points are shown to be less where few answers
    change, instead of 5 %.

    Attributes:
        lost: Answers of each task that only the reference has right, shape [..., tasks].
        won: Those that only the candidate has right, same shape.
        kept: Those that both have right, same shape.
        items: Number of items of each task, shape [tasks].
        share: Part of the reference's accuracy that is asked for; 1 for the plain difference.

    Source: Tango, Equivalence Test and Confidence Interval for the Difference in Proportions for the Paired-Sample Design, Statistics
    in Medicine 17(8), 1998; for other shares Nam and Blackwelder, Analysis of the Ratio of Marginal Probabilities in a Matched-Pair
    Setting, Statistics in Medicine 21(5), 2002; the two answers and the strata as in `harness.stats.intervals.adjusted_difference`.
    """

    lost: NDArray[np.float64]
    won: NDArray[np.float64]
    kept: NDArray[np.float64]
    items: NDArray[np.float64]
    share: float = 1.0

    @classmethod
    def of(cls, candidate: Sequence[Samples], reference: Sequence[Samples], share: float = 1.0) -> AnswerLoss:
        """The loss in correctness, 0..1, of the items of each task, shape [items].

        Raises:
            ValueError: Tasks or items do not match, there are none, or a value is not finite.
        """
        pairs = [paired_values(ours, theirs) for ours, theirs in zip(candidate, reference, strict=True)]
        if not pairs:
            raise ValueError("at least one task is needed")
        counts = [
            (np.maximum(theirs - ours, 0).sum(), np.maximum(ours - theirs, 0).sum(), np.minimum(ours, theirs).sum(), len(ours))
            for ours, theirs in pairs
        ]
        lost, won, kept, items = np.array(counts, dtype=np.float64).T
        return cls(lost, won, kept, items, share)

    @cached_property
    def value(self) -> Any:
        return self._of_tasks.mean(axis=-1)

    @cached_property
    def error(self) -> Any:
        return self._error(self.value)

    @property
    def count(self) -> int:
        return int(self.items.sum())

    def sides(self, bound: float) -> Sides:
        distance = (self.value - bound) / self._error(bound)
        return Sides(special.ndtr(distance), special.ndtr(-distance))

    def power(self, count: int, bound: float, level: float) -> float:
        """As of `Loss`: the normal distribution, with the items in the same parts of each task."""
        distance = abs(float(self.value) - bound) * math.sqrt(count / self.count)
        return float(special.ndtr((distance + special.ndtri(level) * self._error(bound)) / self.error))

    @property
    def _extra(self) -> float:
        """What each task has of the answer that turned right, and of the one that turned wrong."""
        return 1 / len(self.items)

    @property
    def _totals(self) -> NDArray[np.float64]:
        return self.items + 2 * self._extra

    @cached_property
    def _of_tasks(self) -> Any:
        """The loss of each task, shape [..., tasks]."""
        lost, won = self.lost + self._extra, self.won + self._extra
        return (self.share * lost - won - (1 - self.share) * self.kept) / self._totals

    def _error(self, bound: Any) -> Any:
        """Standard error of the loss if its true value were the bound, shape [...]."""
        change = np.expand_dims(bound - self.value, -1)
        lost, won = (self.lost + self._extra) / self._totals, (self.won + self._extra) / self._totals
        likely_lost, likely_won = _likeliest(lost, won, np.clip(lost - won + change, -1, 1))
        likely_kept = np.maximum(lost + self.kept / self._totals - likely_lost, 0)
        squares = self.share**2 * likely_lost + likely_won + (1 - self.share) ** 2 * likely_kept
        variances = (squares - (self._of_tasks + change) ** 2) / self._totals
        return np.sqrt(variances.sum(axis=-1)) / len(self.items)


def _likeliest(lost: Any, won: Any, deficit: Any) -> tuple[Any, Any]:
    """The likeliest true shares of lost and of won answers whose difference is `deficit`, where `lost` and `won` were counted."""
    swapped, size = deficit < 0, np.abs(deficit)
    more, fewer = np.where(swapped, won, lost), np.where(swapped, lost, won)
    part = more + fewer - size * (2 + fewer - more)
    least = (part + np.sqrt(part**2 + 8 * fewer * size * (1 - size))) / 4
    return np.where(swapped, least, least + size), np.where(swapped, least + size, least)
