"""Tests of differences: is a change more than chance? All are paired over shared items and two-sided.

The intervals of the same differences stand in `harness.stats.intervals`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from slimbench.harness.stats.bootstrap import Samples, paired_values
from slimbench.harness.stats.intervals import adjusted_difference, task_changes

LEVEL = 0.05


class StandardErrors(NamedTuple):
    """Standard errors of one mean difference: as if the items were not shared, and paired."""

    unpaired: float
    paired: float

    @property
    def gain(self) -> float:
        """How many times smaller pairing makes the standard error; `inf` where all items differ by the same."""
        return self.unpaired / self.paired if self.paired else math.inf


class Flips(NamedTuple):
    """Items whose answer changed: right in the reference and wrong in the candidate, and the other way."""

    right_to_wrong: int
    wrong_to_right: int


def standard_errors(candidate: Samples, reference: Samples) -> StandardErrors:
    """Standard error of mean(candidate) - mean(reference) without and with pairing.

    Args:
        candidate: One value an item, such as the mean NLL of a window, shape [items].
        reference: The same items in the same order, shape [items].

    Returns:
        sqrt(var(candidate) / n + var(reference) / n) and sqrt(var(candidate - reference) / n); `nan` for a single item.

    Raises:
        ValueError: Different numbers of items, none, or one that is not finite.

    Source: Miller, Adding Error Bars to Evals, 2024 (arXiv:2411.00640), section 4.2.
    """
    ours, theirs = paired_values(candidate, reference)
    if len(ours) < 2:
        return StandardErrors(math.nan, math.nan)
    return StandardErrors(math.hypot(stats.sem(ours), stats.sem(theirs)), float(stats.sem(ours - theirs)))


def paired_p_value(candidate: Samples, reference: Samples) -> float:
    """p-value of a mean difference over shared items: the paired t-test.

    Args:
        candidate: One value an item, shape [items].
        reference: The same items in the same order, shape [items].

    Returns:
        Two-sided p-value; 1 where the samples are identical, `nan` for a single item.

    Raises:
        ValueError: Different numbers of items, none, or one that is not finite.

    Source: `paired_p_values`.
    """
    ours, theirs = paired_values(candidate, reference)
    return float(paired_p_values(ours - theirs))


def paired_p_values(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """p-values of mean differences, many at once: the paired t-test.

    A sign-flip permutation test cannot go below 2 ** (1 - items), which no correction for many pairs survives; the t-test can.
    Two models of equal quality differ symmetrically, and then it is exact for normal and conservative for heavy-tailed
    differences at any number of items. Where the true mean is zero and yet the differences are skewed, it errs: at a
    skewness of 1 false positives are 6.6 % for 8 items, 6.1 % for 16 and 5.3 % for 64, instead of 5 %.

    Args:
        differences: candidate - reference, shape [..., items].

    Returns:
        Two-sided p-values, shape [...]; 1 where all differences are zero, `nan` for a single item.

    Source: Student, Biometrika 6(1), 1908; agrees with `scipy.stats.ttest_rel`.
    """
    count = differences.shape[-1]
    if count < 2:
        return np.full(differences.shape[:-1], math.nan)
    mean, error = differences.mean(axis=-1), differences.std(axis=-1, ddof=1) / math.sqrt(count)
    with np.errstate(divide="ignore", invalid="ignore"):
        p_values = 2 * special.stdtr(count - 1, -np.abs(mean / error))
    return np.where((mean == 0) & (error == 0), 1.0, p_values)


def flips(candidate: Samples, reference: Samples) -> Flips:
    """How many answers changed. A correctness of at least one half is right.

    Args:
        candidate: Correctness of each item, 0..1, shape [items].
        reference: The same items in the same order, shape [items].

    Raises:
        ValueError: Different numbers of items, none, or one that is not finite.

    Source: Dutta et al., Accuracy is Not All You Need, 2024 (arXiv:2407.09141).
    """
    ours, theirs = (values >= 0.5 for values in paired_values(candidate, reference))
    return Flips(int((theirs & ~ours).sum()), int((ours & ~theirs).sum()))


def mcnemar(right_to_wrong: ArrayLike, wrong_to_right: ArrayLike) -> NDArray[np.float64]:
    """McNemar's exact test: may the changed answers have gone either way with equal chance?

    Args:
        right_to_wrong: Number of items that only the reference has right, any shape.
        wrong_to_right: Number of items that only the candidate has right, same shape.

    Returns:
        Two-sided p-values of the binomial test, same shape; 1 where nothing changed. Conservative, as the counts are discrete.

    Source: McNemar, Psychometrika 12(2), 1947; agrees with `statsmodels.stats.contingency_tables.mcnemar(exact=True)`.
    """
    lost, won = (np.asarray(counts).astype(np.intp) for counts in (right_to_wrong, wrong_to_right))
    return np.minimum(1.0, 2 * special.bdtr(np.minimum(lost, won), lost + won, 0.5))


def accuracy_p_value(candidate: Sequence[Samples], reference: Sequence[Samples]) -> float:
    """p-value of a difference of macro-average accuracy over shared items.

    It is below 5 % exactly where the interval of `harness.stats.intervals.accuracy_delta_interval` leaves out zero.

    Args:
        candidate: For each task the correctness of its items, 0..1, shape [items].
        reference: The same tasks and items in the same order.

    Returns:
        Two-sided p-value; 1 where no answer changed.

    Raises:
        ValueError: As of `harness.stats.intervals.accuracy_delta_interval`.

    Source: `accuracy_p_values`.
    """
    return float(accuracy_p_values(*task_changes(candidate, reference)))


def accuracy_p_values(sums: NDArray[np.float64], squares: NDArray[np.float64], items: NDArray[np.float64]) -> NDArray[np.float64]:
    """p-values of differences of macro-average accuracy, many at once: the normal test of `harness.stats.intervals.adjusted_difference`.

    McNemar's test of all items together would ask another question: there a large task outweighs small ones, and its answer can
    have the opposite sign.

    Args:
        sums: Sum of the items' differences of each task, shape [..., tasks].
        squares: Sum of their squares, same shape.
        items: Number of items of each task, shape [tasks].

    Returns:
        Two-sided p-values, shape [...].
    """
    middle, error = adjusted_difference(sums, squares, items)
    return np.asarray(2 * special.ndtr(-np.abs(middle / error)))


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """p-values adjusted so that the chance of any false positive among them stays below the level at which they are read.

    Args:
        p_values: p-values of one family of tests, shape [tests]; `nan` stands for a test that could not be made.

    Returns:
        Adjusted p-values, shape [tests]; `nan` stays `nan` and does not count.

    Source: Holm, Scandinavian Journal of Statistics 6(2), 1979; agrees with `statsmodels.stats.multitest.multipletests`, which is
    too slow for a board: it collects garbage at each call.
    """
    values = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full_like(values, math.nan)
    ascending = np.argsort(values)[: int((~np.isnan(values)).sum())]
    steps = values[ascending] * np.arange(len(ascending), 0, -1)
    adjusted[ascending] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted
