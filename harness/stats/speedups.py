"""Ratios of median times: of pairs that were taken one after the other, and through a common reference."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from slimbench.harness.stats.bootstrap import RESAMPLES, UNDEFINED, Estimate, Samples, paired_values, percentile_interval
from slimbench.harness.stats.intervals import FEWEST_FOR_MEDIAN, median_interval


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
    ratios = _speedups(candidate_ms, reference_ms)
    return Estimate(float(np.median(ratios)), *median_interval(ratios, level))


def indirect_speedup(
    candidate: tuple[Samples, Samples], other: tuple[Samples, Samples], level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """How many times faster the candidate is than another that was measured apart, through the reference that both ran next to.

    The ratio of their paired speed-ups; drift between the two measurements cancels as far as the reference shows it too.

    Args:
        candidate: Times of the candidate and of the reference next to them, each of shape [pairs].
        other: The same for the other; the number of pairs may differ.
        level: Confidence, 0..1.
        resamples: Bootstrap samples drawn, of the pairs of each measurement.
        seed: Seed of the draw.

    Returns:
        Ratio of the median speed-ups, lower bound, upper bound; coverage is 95 to 97.5 %. Fewer than six pairs give no bounds (`nan`).

    Raises:
        ValueError: Different numbers of samples in a pair, none, or a time that is not finite and above zero.

    Source: `paired_speedup`; percentile bootstrap of medians, Wilcox, Introduction to Robust Estimation, 4th ed. 2017, section 5.4.
    """
    ours, theirs = _speedups(*candidate), _speedups(*other)
    ratio = float(np.median(ours) / np.median(theirs))
    if min(len(ours), len(theirs)) < FEWEST_FOR_MEDIAN:
        return Estimate(ratio, *UNDEFINED)
    return Estimate(ratio, *percentile_interval((ours, theirs), _ratio_of_medians, level, resamples, seed))


def _speedups(candidate_ms: Samples, reference_ms: Samples) -> NDArray[np.float64]:
    """Reference / candidate of each pair of times, shape [pairs]."""
    ours, theirs = paired_values(candidate_ms, reference_ms)
    if min(ours.min(), theirs.min()) <= 0:
        raise ValueError("times must be above zero")
    return theirs / ours


def _ratio_of_medians(ours: NDArray[np.float64], theirs: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    return np.asarray(np.median(ours, axis=axis) / np.median(theirs, axis=axis))
