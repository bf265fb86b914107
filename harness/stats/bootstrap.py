"""Resampling, quantiles and the small arithmetic that estimators share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Samples = Sequence[float] | NDArray[np.floating[Any]]


Interval = tuple[float, float]


class Estimate(NamedTuple):
    """A number with the bounds of its interval; bounds are `nan` where the samples allow none."""

    value: float
    low: float
    high: float


UNDEFINED: Interval = (math.nan, math.nan)


UNKNOWN = Estimate(math.nan, *UNDEFINED)


RESAMPLES = 2000


_BATCH = 256


MOST_KEPT = 4096


T = TypeVar("T")
U = TypeVar("U")


def attempt(estimator: Callable[..., T], *samples: Any, otherwise: U) -> T | U:
    """What an estimator says of samples, or `otherwise` where they do not allow an estimate."""
    try:
        return estimator(*samples)
    except ValueError:
        return otherwise


@lru_cache(maxsize=4)
def resample_counts(count: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """How often each of `count` samples is drawn, shape [resamples, count]: those that `scipy.stats.bootstrap` draws from the seed.

    Rows of a board have equally many windows, so drawing once serves them all.
    """
    rng = np.random.default_rng(seed)
    drawn = np.zeros((resamples, count))
    for begin in range(0, resamples, _BATCH):
        block = drawn[begin : begin + _BATCH]
        np.add.at(block, (np.arange(len(block))[:, None], rng.integers(0, count, (len(block), count))), 1)
    return drawn


def ratio_of_sums(numerators: NDArray[np.float64], denominators: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    return np.asarray(numerators.sum(axis) / denominators.sum(axis))


def percentile_interval(
    samples: tuple[NDArray[np.float64], ...], statistic: Callable[..., Any], level: float, resamples: int, seed: int, paired: bool = False
) -> Interval:
    """Percentile interval of a statistic that works along `axis`."""
    interval = stats.bootstrap(
        samples,
        statistic,
        confidence_level=level,
        n_resamples=resamples,
        batch=_BATCH,
        vectorized=True,
        paired=paired,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def quantiles(draws: NDArray[np.float64], *levels: float) -> tuple[float, ...]:
    """Quantiles by linear interpolation, as `np.quantile` gives them at a tenth of its time, for arrays as small as these."""
    last = len(draws) - 1
    places = [(int(level * last), level * last % 1) for level in levels]
    ordered = np.partition(draws, sorted({neighbour for below, _ in places for neighbour in (below, min(below + 1, last))}))
    return tuple(float(ordered[below] + (ordered[min(below + 1, last)] - ordered[below]) * part) for below, part in places)


@lru_cache(maxsize=256)
def expanded_level(count: float, level: float) -> float:
    """Level at which a percentile bootstrap of `count` samples is as wide as Student's t interval of `level`."""
    tail = float(stats.norm.cdf(stats.t.ppf((1 - level) / 2, count - 1) * math.sqrt(count / (count - 1))))
    return 1 - 2 * tail


@lru_cache(maxsize=256)
def normal_quantile(level: float) -> float:
    """How many standard errors on each side hold so much of a normal distribution."""
    return float(stats.norm.isf((1 - level) / 2))


def exp_or_inf(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def finite(samples: Samples) -> NDArray[np.float64]:
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError("at least one sample is needed, in one dimension")
    if not math.isfinite(np.add.reduce(values)) and not np.isfinite(values).all():  # a finite sum has finite terms
        raise ValueError("samples must be finite")
    return values


def paired_values(candidate: Samples, reference: Samples) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both as arrays; `ValueError` unless they have equally many finite values, at least one."""
    ours, theirs = finite(candidate), finite(reference)
    if len(ours) != len(theirs):
        raise ValueError(f"pairs are needed, not {len(ours)} against {len(theirs)} samples")
    return ours, theirs
