"""Intervals of every number on the board. All are functions of the kept samples; those that resample take a seed.

Means (perplexity, differences) use the percentile bootstrap with Hesterberg's correction for small samples; medians
(times, speed-ups) use order statistics, which assume nothing but independent draws. Undefined intervals are `nan`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Samples = Sequence[float] | NDArray[np.floating[Any]]
Interval = tuple[float, float]
Estimate = tuple[float, float, float]

UNDEFINED: Interval = (math.nan, math.nan)
RESAMPLES = 2000


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
    values = _finite(samples)
    interval = stats.quantile_test(values, p=0.5).confidence_interval(level)
    low, high = float(interval.low), float(interval.high)
    return (float(values.min()), float(values.max())) if math.isnan(low) or math.isnan(high) else (low, high)


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
    values = _finite(samples)
    if len(values) < 2:
        return UNDEFINED
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    widened = _expanded_level(len(values), level)
    result = stats.bootstrap(
        (values,), np.mean, confidence_level=widened, n_resamples=resamples, batch=256, method="percentile", rng=np.random.default_rng(seed)
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def perplexity(window_nll: Samples) -> float:
    """Perplexity of windows with equally many labels: the exponential of their mean NLL in nats; inf where it overflows."""
    return _exp(float(np.mean(_finite(window_nll))))


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
    return _exp(low), _exp(high)


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
    ours, theirs = _paired(candidate, reference)
    differences = ours - theirs
    return float(differences.mean()), *mean_interval(differences, level, resamples, seed)


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
    return _exp(delta), _exp(low), _exp(high)


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
    variances = [stats.sem(values) ** 2 if len(values) > 1 else math.nan for values in _tasks(tasks)]
    return math.sqrt(sum(variances)) / len(variances)


def accuracy_interval(tasks: Sequence[Samples], level: float = 0.95) -> Estimate:
    """Macro-average accuracy over tasks, with the normal interval of its standard error, cut to 0..1.

    Args:
        tasks: For each task the correctness of its items, 0..1, shape [items].
        level: Confidence, 0..1.

    Returns:
        Accuracy, lower bound, upper bound; bounds are `nan` where the standard error is.

    Raises:
        ValueError: No task, a task without items, or a value that is not finite.

    Source: `accuracy_se`; central limit theorem, so some thirty items a task are needed.
    """
    mean = float(np.mean([values.mean() for values in _tasks(tasks)]))
    reach = float(stats.norm.isf((1 - level) / 2)) * accuracy_se(tasks)
    return (mean, *UNDEFINED) if math.isnan(reach) else (mean, max(0.0, mean - reach), min(1.0, mean + reach))


def accuracy_delta_interval(
    candidate: Sequence[Samples], reference: Sequence[Samples], level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Difference of macro-average accuracy, with its paired bootstrap interval; items are drawn within their task.

    Args:
        candidate: For each task the correctness of its items, 0..1, shape [items].
        reference: The same tasks and items in the same order.
        level: Confidence, 0..1.
        resamples: Bootstrap samples drawn.
        seed: Seed of the draw.

    Returns:
        Mean difference (candidate - reference), lower bound, upper bound.

    Raises:
        ValueError: Tasks or items do not match, there are none, or a value is not finite.

    Source: stratified bootstrap, Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.2.
    """
    differences = [np.subtract(*_paired(ours, theirs)) for ours, theirs in zip(_tasks(candidate), _tasks(reference), strict=True)]
    rng = np.random.default_rng(seed)
    draws = np.mean([_resampled_means(d, resamples, rng) for d in differences], axis=0)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(np.mean([d.mean() for d in differences])), float(low), float(high)


def paired_speedup(candidate_ms: Samples, reference_ms: Samples, level: float = 0.95) -> Estimate:
    """How many times faster the candidate is: the median of reference / candidate over adjacent pairs of times.

    Samples of a pair were taken one right after the other, so slow drift of the machine cancels in their ratio.

    Args:
        candidate_ms: Times of the candidate, shape [pairs].
        reference_ms: Times of the reference taken next to them, shape [pairs].
        level: Confidence, 0..1.

    Returns:
        Median ratio, lower bound, upper bound (`median_interval`).

    Raises:
        ValueError: Different numbers of samples, none, or a time that is not finite and above zero.

    Source: Kalibera and Jones, Rigorous Benchmarking in Reasonable Time, ISMM 2013 (ratio of times with its interval).
    """
    ours, theirs = _paired(candidate_ms, reference_ms)
    if min(ours.min(), theirs.min()) <= 0:
        raise ValueError("times must be above zero")
    ratios = theirs / ours
    return float(np.median(ratios)), *median_interval(ratios, level)


def _resampled_means(values: NDArray[np.float64], resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Means of bootstrap samples, shape [resamples]; drawn as counts of the few distinct values that items have."""
    distinct, counts = np.unique(values, return_counts=True)
    return rng.multinomial(len(values), counts / len(values), size=resamples) @ distinct / len(values)


def _expanded_level(count: int, level: float) -> float:
    """Level at which a percentile bootstrap of `count` samples is as wide as Student's t interval of `level`."""
    tail = float(stats.norm.cdf(stats.t.ppf((1 - level) / 2, count - 1) * math.sqrt(count / (count - 1))))
    return 1 - 2 * tail


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _finite(samples: Samples) -> NDArray[np.float64]:
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError("at least one sample is needed, in one dimension")
    if not np.isfinite(values).all():
        raise ValueError("samples must be finite")
    return values


def _paired(candidate: Samples, reference: Samples) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    ours, theirs = _finite(candidate), _finite(reference)
    if len(ours) != len(theirs):
        raise ValueError(f"pairs are needed, not {len(ours)} against {len(theirs)} samples")
    return ours, theirs


def _tasks(tasks: Sequence[Samples]) -> list[NDArray[np.float64]]:
    if not len(tasks):
        raise ValueError("at least one task is needed")
    return [_finite(values) for values in tasks]
