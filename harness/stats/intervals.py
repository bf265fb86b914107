"""Intervals of every number on the board. All are functions of the kept samples; those that resample take a seed.

Means (perplexity, differences) use the percentile bootstrap with Hesterberg's correction for small samples; medians
(times, speed-ups) use order statistics, which assume nothing but independent draws. Undefined intervals are `nan`.
Tests of significance stand in `harness.stats.significance`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from slimbench.harness.stats.bootstrap import (
    MOST_KEPT,
    RESAMPLES,
    UNDEFINED,
    Estimate,
    Interval,
    Samples,
    exp_or_inf,
    expanded_level,
    finite,
    normal_quantile,
    paired_values,
    percentile_interval,
    quantiles,
    ratio_of_sums,
    resample_counts,
)

FEWEST_FOR_MEDIAN = 6
"""Below so many samples no two of them bound the median with 95 % confidence."""


def median_interval(samples: Samples, level: float = 0.95) -> Interval:
    """Non-parametric confidence interval of the median, from binomial order statistics.

    The k-th smallest and k-th largest sample, with the largest k for which the chance that the median lies outside is
    at most `1 - level`. Coverage is therefore at least `level` for any continuous distribution. No such k exists for
    few samples (n < 6 at 95 %): then the smallest and largest are returned, which cover only `1 - 2 ** (1 - n)`.

    Args:
        samples: Independent samples, shape [n], any unit.
        level: Confidence, 0..1.

    Returns:
        Lower and upper bound in the unit of the samples.

    Raises:
        ValueError: No samples, or one that is not finite.

    Source: Conover, Practical Nonparametric Statistics, 3rd ed. 1999, section 3.2; `scipy.stats.quantile_test`.
    """
    values = finite(samples)
    low, high = _median_bounds(len(values), level)
    ordered = np.sort(values)
    return float(ordered[low]), float(ordered[high])


@lru_cache(maxsize=256)
def _median_bounds(count: int, level: float) -> tuple[int, int]:
    """Positions, among `count` sorted samples, of the bounds of their median: they depend on nothing else."""
    interval = stats.quantile_test(np.arange(count), p=0.5).confidence_interval(level)
    low, high = float(interval.low), float(interval.high)
    return (0, count - 1) if math.isnan(low) or math.isnan(high) else (int(low), int(high))


def mean_interval(samples: Samples, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Bootstrap interval of a mean.

    Percentile intervals of small samples are too narrow, so their tail probability is taken from Student's t and
    widened by sqrt(n / (n - 1)). Below some eight samples no resampling can make up for the missing spread: coverage
    falls to about 92 % at n = 5 and 75 % at n = 3.

    Args:
        samples: Independent samples, shape [n].
        level: Confidence, 0..1.
        resamples: Bootstrap samples drawn.
        seed: Seed of the draw.

    Returns:
        Lower and upper bound; `nan` for a single sample, which says nothing about spread.

    Raises:
        ValueError: No samples, or one that is not finite.

    Source: Hesterberg, What Teachers Should Know About the Bootstrap, 2015 (arXiv:1411.5279).
    """
    values = finite(samples)
    if len(values) < 2:
        return UNDEFINED
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    if len(values) > MOST_KEPT:
        return percentile_interval((values,), np.mean, expanded_level(len(values), level), resamples, seed)
    means = resample_counts(len(values), resamples, seed) @ values / len(values)
    tail = (1 - expanded_level(len(values), level)) / 2
    low, high = quantiles(means, tail, 1 - tail)
    return low, high


def perplexity(window_nll: Samples) -> float:
    """Perplexity of windows with equally many labels: the exponential of their mean NLL in nats; inf where it overflows."""
    return exp_or_inf(float(np.mean(finite(window_nll))))


def perplexity_interval(window_nll: Samples, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Bootstrap interval of a perplexity, over windows.

    Args:
        window_nll: Mean NLL of each window in nats, shape [windows]; equally many labels in each.
        level: Confidence, 0..1.
        resamples: Bootstrap samples drawn.
        seed: Seed of the draw.

    Raises:
        ValueError: No windows, or one whose NLL is not finite.

    Source: `mean_interval`; the exponential is monotone, so it carries the bounds over.
    """
    low, high = mean_interval(window_nll, level, resamples, seed)
    return exp_or_inf(low), exp_or_inf(high)


def paired_delta_interval(
    candidate: Samples, reference: Samples, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Mean of candidate - reference over shared items, with its paired bootstrap interval.

    Args:
        candidate: One value an item, shape [items].
        reference: The same items in the same order, shape [items].
        level: Confidence, 0..1.
        resamples: Bootstrap samples drawn.
        seed: Seed of the draw.

    Returns:
        Mean difference, lower bound, upper bound.

    Raises:
        ValueError: Different numbers of items, none, or one that is not finite.

    Source: Koehn, Statistical Significance Tests for Machine Translation Evaluation, EMNLP 2004; `mean_interval`.
    """
    ours, theirs = paired_values(candidate, reference)
    differences = ours - theirs
    return Estimate(float(differences.mean()), *mean_interval(differences, level, resamples, seed))


def perplexity_ratio_interval(
    candidate_nll: Samples, reference_nll: Samples, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Perplexity of the candidate over that of the reference, with its paired bootstrap interval over shared windows.

    Pairing removes the difficulty of the text, which both models share, so small losses show at few windows.

    Args:
        candidate_nll: Mean NLL of each window in nats, shape [windows].
        reference_nll: The same windows in the same order, shape [windows].
        level: Confidence, 0..1.
        resamples: Bootstrap samples drawn.
        seed: Seed of the draw.

    Returns:
        Ratio, lower bound, upper bound.

    Raises:
        ValueError: Different numbers of windows, none, or one whose NLL is not finite.

    Source: the exponential of `paired_delta_interval`, as a ratio of perplexities is the exponential of a mean difference.
    """
    delta, low, high = paired_delta_interval(candidate_nll, reference_nll, level, resamples, seed)
    return Estimate(exp_or_inf(delta), exp_or_inf(low), exp_or_inf(high))


def document_perplexity_interval(nll: Samples, units: Samples, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Perplexity per word (or byte) of whole documents, exp(sum nll / sum units), with its bootstrap interval over documents.

    Documents are drawn with their length. Small samples are corrected as in `mean_interval`, by the effective number of documents,
    which is less than their number where their lengths differ. That is not enough below ten: coverage is about 91 % at five.

    Args:
        nll: Sum of the negative log-likelihoods of each document in nats, shape [documents].
        units: Words or bytes of each document, above zero, shape [documents].
        level: Confidence, 0..1.
        resamples: Bootstrap samples drawn.
        seed: Seed of the draw.

    Returns:
        Perplexity, lower bound, upper bound; bounds are `nan` for a single document.

    Raises:
        ValueError: Different numbers of values, none, one that is not finite, or a document without units.

    Source: bootstrap of a ratio of sums, Davison and Hinkley 1997, section 2.2; effective sample size, Kish, Survey Sampling, 1965.
    """
    sums, lengths = paired_values(nll, units)
    if lengths.min() <= 0:
        raise ValueError("every document needs at least one unit")
    mean = exp_or_inf(float(sums.sum() / lengths.sum()))
    if len(sums) < 2:
        return Estimate(mean, *UNDEFINED)
    effective = float(lengths.sum() ** 2 / (lengths**2).sum())
    low, high = percentile_interval((sums, lengths), ratio_of_sums, expanded_level(effective, level), resamples, seed, paired=True)
    return Estimate(mean, exp_or_inf(low), exp_or_inf(high))


def document_ratio_interval(
    candidate_nll: Samples, reference_nll: Samples, units: Samples, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Document perplexity of the candidate over that of the reference, with its paired bootstrap interval over documents.

    Args:
        candidate_nll: Sum of the negative log-likelihoods of each document in nats, shape [documents].
        reference_nll: The same documents in the same order, shape [documents].
        units: Words or bytes of each document, shape [documents].
        level: Confidence, 0..1.
        resamples: Bootstrap samples drawn.
        seed: Seed of the draw.

    Returns:
        Ratio, lower bound, upper bound.

    Raises:
        ValueError: As of `document_perplexity_interval`.

    Source: `document_perplexity_interval` of the differences, as documents and their lengths are shared.
    """
    ours, theirs = paired_values(candidate_nll, reference_nll)
    return document_perplexity_interval(ours - theirs, units, level, resamples, seed)


def accuracy_se(tasks: Sequence[Samples]) -> float:
    """Standard error of the macro-average accuracy: tasks are fixed and weigh the same, items within a task are independent.

    Args:
        tasks: For each task the correctness of its items, 0..1, shape [items]; numbers of items may differ.

    Returns:
        Standard error; `nan` where a task has a single item.

    Raises:
        ValueError: No task, a task without items, or a value that is not finite.

    Source: Miller, Adding Error Bars to Evals, 2024 (arXiv:2411.00640); variance of a mean of independent means.
    """
    variances = [values.var(ddof=1) / len(values) if len(values) > 1 else math.nan for values in _tasks(tasks)]
    return math.sqrt(sum(variances)) / len(variances)


def accuracy_delta_interval(candidate: Sequence[Samples], reference: Sequence[Samples], level: float = 0.95) -> Estimate:
    """Difference of macro-average accuracy over shared items, each task weighs the same, with its interval.

    Coverage is 94 to 97 % at a level of 95 %, and more where only a few answers change: a bootstrap of those is too narrow.

    Args:
        candidate: For each task the correctness of its items, 0..1, shape [items]; numbers of items may differ.
        reference: The same tasks and items in the same order.
        level: Confidence, 0..1.

    Returns:
        Mean difference (candidate - reference), lower bound, upper bound.

    Raises:
        ValueError: Tasks or items do not match, there are none, or a value is not finite.

    Source: `adjusted_difference`.
    """
    sums, squares, items = task_changes(candidate, reference)
    return Estimate(float((sums / items).mean()), *_bounds_of_shares(*adjusted_difference(sums, squares, items), level))


def task_changes(candidate: Sequence[Samples], reference: Sequence[Samples]) -> NDArray[np.float64]:
    """What `adjusted_difference` takes, for two models on shared items: sums, squares and numbers of items, shape [3, tasks].

    Args:
        candidate: For each task the correctness of its items, 0..1, shape [items].
        reference: The same tasks and items in the same order.

    Raises:
        ValueError: As of `accuracy_delta_interval`.
    """
    pairs = zip(_tasks(candidate), _tasks(reference), strict=True)
    changes = [np.subtract(*paired_values(ours, theirs)) for ours, theirs in pairs]
    return np.array([(change.sum(), change @ change, len(change)) for change in changes]).T


def adjusted_difference(
    sums: NDArray[np.float64], squares: NDArray[np.float64], items: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Macro-average of paired differences and its standard error, as if one more answer had turned right and one wrong.

    These two answers are shared between the tasks: 1 / tasks of each in every one.

    Args:
        sums: Sum of the items' differences of each task, shape [..., tasks].
        squares: Sum of their squares, same shape; with right and wrong alone, the number of changed answers.
        items: Number of items of each task, shape [tasks].

    Returns:
        Difference and standard error, shape [...].

    Source: Bonett and Price, Adjusted Wald Confidence Interval for a Difference of Binomial Proportions Based on Paired Data,
    Journal of Educational and Behavioral Statistics 37(4), 2012, on strata: the variance of a mean of independent means.
    """
    tasks = np.shape(items)[-1]
    totals = items + 2 / tasks
    means = sums / totals
    variances = ((squares + 2 / tasks) / totals - means**2) / totals
    return means.mean(axis=-1), np.sqrt(variances.sum(axis=-1)) / tasks


def _bounds_of_shares(middle: Any, error: Any, level: float) -> Interval:
    """Bounds of a difference of shares, at most 1 away from 0."""
    reach = normal_quantile(level) * float(error)
    return max(-1.0, float(middle) - reach), min(1.0, float(middle) + reach)


def flips_interval(right_to_wrong: int, wrong_to_right: int, items: int, level: float = 0.95) -> Interval:
    """Interval of the accuracy difference on one set of items, from the answers that changed.

    Fit for single tasks with few items or few changes, and for levels far above 95 %, where the bootstrap is too narrow.
    Coverage is at least 94 % at a level of 95 %, 99.2 % at 99.5 %, and more where only a few answers change.

    Args:
        right_to_wrong: Items that only the reference has right.
        wrong_to_right: Items that only the candidate has right.
        items: All items, changed or not.
        level: Confidence, 0..1.

    Returns:
        Lower and upper bound of accuracy(candidate) - accuracy(reference).

    Raises:
        ValueError: Negative counts, or more changes than items.

    Source: `adjusted_difference` of a single task.
    """
    if min(right_to_wrong, wrong_to_right) < 0 or right_to_wrong + wrong_to_right > items:
        raise ValueError(f"{right_to_wrong} and {wrong_to_right} changes do not fit {items} items")
    counts = (wrong_to_right - right_to_wrong, wrong_to_right + right_to_wrong, items)
    return _bounds_of_shares(*adjusted_difference(*(np.array([count], dtype=np.float64) for count in counts)), level)


def _tasks(tasks: Sequence[Samples]) -> list[NDArray[np.float64]]:
    if not len(tasks):
        raise ValueError("at least one task is needed")
    return [finite(values) for values in tasks]
