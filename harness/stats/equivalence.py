"""Is a loss within a margin? Verdicts of the rows of a table, what would resolve an open one, and what a table can see at all.

That no difference was found makes no two models equal. A row is equivalent where its loss is shown to be less than the margin in either
direction, by two one-sided tests of 5 % each (Schuirmann, Journal of Pharmacokinetics and Biopharmaceutics 15(6), 1987).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from slimbench.harness.stats.losses import Loss
from slimbench.harness.stats.significance import LEVEL, holm

PERPLEXITY_MARGIN = math.log(1.01)
"""1 % of the reference's perplexity, in nats."""
ACCURACY_MARGIN = 0.03
"""3 points, as a share of the items."""
POWER = 0.8
_MOST = 10**8
"""More items than anybody will measure."""


class Verdict(StrEnum):
    """What a row is against its reference at a margin."""

    EQUIVALENT = "equivalent"
    """It is shown to lose less than the margin, and to gain less."""
    WORSE = "worse"
    """It is shown to lose the margin or more."""
    BETTER = "better"
    """It is shown to gain the margin or more, on these items: so it is not worse."""
    UNRESOLVED = "unresolved"
    """None of these is shown."""


class Judgement(NamedTuple):
    """A verdict, and the corrected p-value of the claim that the row comes nearest to."""

    verdict: Verdict
    p: float


_CLAIMS = (Verdict.EQUIVALENT, Verdict.WORSE, Verdict.BETTER)


def p_values(loss: Loss, margin: float) -> NDArray[np.float64]:
    """p-values of the claims `equivalent`, `worse` and `better`.

    Whatever the true loss, one of the three is true, and the chance that either of the others gets a p-value below a level is at most that
    level. So a row makes the claim of its least p-value, and needs no correction for having three to choose from.

    Args:
        loss: Of one row, or of many of shape [...].
        margin: In the unit of the loss, above zero.

    Returns:
        Shape [..., 3]. Of `equivalent` the larger p-value of its two tests; of `worse` and `better` that of a change by no more than the
        margin, a tail at each bound, of which the farther one counts only where the margin is not much more than a standard error.

    Source: Schuirmann 1987; Finner and Strassburger, The Partitioning Principle, Annals of Statistics 30(4), 2002.
    """
    high, low = loss.sides(margin), loss.sides(-margin)
    outside = [np.minimum(1.0, high.above + low.above), np.minimum(1.0, high.below + low.below)]
    return np.stack([np.maximum(high.below, low.above), *outside], axis=-1)


def judge(claims: Sequence[NDArray[np.float64]]) -> list[Judgement]:
    """The verdicts of the rows of one table: of each the claim of its least p-value, after Holm's correction over the rows.

    Rows of a table share windows and items, and so err together: the chance that any verdict of the table is false is at most 5 %.

    Args:
        claims: `p_values` of each row, shape [rows, 3]; a row of `nan` is unresolved and counts for nothing.

    Source: Holm, Scandinavian Journal of Statistics 6(2), 1979.
    """
    if not len(claims):
        return []
    nearest, adjusted = np.argmin(claims, axis=-1), holm(np.min(claims, axis=-1))
    return [Judgement(_CLAIMS[claim] if p <= LEVEL else Verdict.UNRESOLVED, float(p)) for claim, p in zip(nearest, adjusted, strict=True)]


def items_to_resolve(loss: Loss, margin: float, level: float = LEVEL, power: float = POWER) -> int | None:
    """How many items would give a row its verdict, if the loss and the spread that were measured are the true ones.

    Args:
        loss: Of one row.
        margin: In the unit of the loss.
        level: At which its p-value is read: 5 % over the number of unresolved rows of the table, as Holm's correction does at the worst.
        power: Chance of the verdict with so many items.

    Returns:
        None where the loss lies so near the margin that no number will do.
    """
    value = float(loss.value)
    if abs(value) < margin:
        return _least(lambda count: loss.power(count, margin, level) + loss.power(count, -margin, level) - 1, power)
    between = 2 * margin / float(loss.error) / math.sqrt(loss.count) if loss.error else math.inf
    bound = math.copysign(margin, value)
    return _least(lambda count: loss.power(count, bound, _nearer_tail(between * math.sqrt(count), level)), power)


def items_to_decide(loss: Loss, bound: float, level: float = LEVEL, power: float = POWER) -> int | None:
    """How many items would show on which side of a bound a loss lies; the rest as of `items_to_resolve`."""
    return _least(lambda count: loss.power(count, bound, level), power)


def detectable(error: float, count: float, level: float = LEVEL, power: float = POWER) -> float:
    """The true difference that a two-sided paired test of as many items finds with the given power.

    Args:
        error: Standard error of the measured difference.
        count: Number of items for Student's t; infinite for a normal test.

    Returns:
        In the unit of the standard error; `nan` where that is unknown.

    Source: the sum of both quantiles, Chow, Shao and Wang, Sample Size Calculations in Clinical Research, 2nd ed. 2008, section 3.1.
    """
    if count < 2:
        return math.nan
    return float(error * sum(special.stdtrit(count - 1, quantile) for quantile in (1 - level / 2, power)))


def items_to_detect(spread: float, difference: float, level: float = LEVEL, power: float = POWER) -> int | None:
    """How many items a two-sided paired test needs to find a true difference with the given power.

    Args:
        spread: Standard deviation of the differences of single items.
        difference: In the unit of the spread, above 0.

    Returns:
        At least two; None where no number that can be measured will do.
    """
    return _least(lambda count: -detectable(spread / math.sqrt(count), count, level, power), -difference)


def _nearer_tail(width: float, level: float) -> float:
    """The tail beyond the nearer of two bounds, `width` standard errors apart, if it and that beyond the farther one add up to `level`."""
    return float(optimize.brentq(lambda tail: tail + special.ndtr(special.ndtri(tail) - width) - level, level / 2, level))


def _least(power: Callable[[int], float], wanted: float) -> int | None:
    """The least number, from two on, at which a rising power reaches what is wanted."""
    low, high = 1, 2
    while power(high) < wanted:
        low, high = high, 2 * high
        if high > _MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= wanted else (middle, high)
    return high
