"""Ratios of median times: of pairs that were taken one after the other, and through a common reference."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from slimbench.harness.stats.bootstrap import RESAMPLES, UNDEFINED, Estimate, Samples, paired_values, percentile_interval
from slimbench.harness.stats.intervals import FEWEST_FOR_MEDIAN, median_interval
from slimbench.harness.stats.processes import middle_over, ratio_over
from slimbench.harness.stats.workload import workload_speedup


def middle(samples: Samples, runs: Sequence[int] = (), level: float = 0.95) -> Estimate:
    """The middle of times: over processes (`processes.middle_over`), or of a single one its median with `median_interval`.

    Args:
        samples: Positive, shape [samples].
        runs: How many each process has; empty for one process.
        level: Confidence, 0..1.

    Raises:
        ValueError: No samples, or ones that do not fit.
    """
    return middle_over(samples, runs, level) if len(runs) > 1 else Estimate(float(np.median(samples)), *median_interval(samples, level))


def paired_speedup(
    candidate_ms: Samples, reference_ms: Samples, level: float = 0.95, runs: Sequence[int] = (), prompts: Sequence[int] = ()
) -> Estimate:
    """How many times faster the candidate is: the median of reference / candidate over adjacent pairs of times.

    Samples of a pair were taken one right after the other, so slow drift of the machine cancels in their ratio. Where prompts differ, it
    is that of the whole workload (`workload_speedup`).

    Args:
        candidate_ms: Times of the candidate, shape [pairs].
        reference_ms: Times of the reference taken next to them, shape [pairs].
        level: Confidence, 0..1.
        runs: How many pairs each process has; empty for one process.
        prompts: Of each pair the number of its prompt; empty where all have the same.

    Returns:
        Middle ratio, lower bound, upper bound (`middle`).

    Raises:
        ValueError: Different numbers of samples, none, or a time that is not finite and above zero.

    Source: Kalibera and Jones, Rigorous Benchmarking in Reasonable Time, ISMM 2013 (ratio of times with its interval).
    """
    if len(prompts):
        return workload_speedup(candidate_ms, reference_ms, prompts, runs, level)
    return middle(_speedups(candidate_ms, reference_ms), runs, level)


def indirect_speedup(
    candidate: tuple[Samples, Samples],
    other: tuple[Samples, Samples],
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    runs: tuple[Sequence[int], Sequence[int]] = ((), ()),
    prompts: tuple[Sequence[int], Sequence[int]] = ((), ()),
) -> Estimate:
    """How many times faster the candidate is than another that was measured apart, through the reference that both ran next to.

    The ratio of their paired speed-ups; drift between the two measurements cancels as far as the reference shows it too. A machine whose
    memory others use as well slows dense weights down more than packed ones, so a speed-up is larger in a busy hour than in a calm one.
    How much of what the reference suffered the candidates did is not known: all of it, and the ratio of speed-ups holds; none of it, and
    that of the candidates' own times does. Over processes the interval reaches over those of both. Whatever share it is between the two,
    the same for both candidates, it then covers the ratio as often as each of them does: a mixture of two estimates lies within the hull
    of their intervals. Rows that suffer more than the reference, or each in its own way, have no one ratio.

    Args:
        candidate: Times of the candidate and of the reference next to them, each of shape [pairs].
        other: The same for the other; the number of pairs may differ.
        level: Confidence, 0..1.
        resamples: Bootstrap samples drawn, of the pairs of each measurement.
        seed: Seed of the draw.
        runs: How many pairs each process of the candidate has, and of the other; of several on both sides `ratio_over` them.
        prompts: Of each pair of the candidate the number of its prompt, and of the other; the intervals of both workloads are then put
            together as those of independent ones.

    Returns:
        Ratio of the middle speed-ups, lower bound, upper bound. Of one process, coverage within it is 95 to 97.5 %, and fewer than six
        pairs give no bounds (`nan`).

    Raises:
        ValueError: Different numbers of samples in a pair, none, or a time that is not finite and above zero.

    Source: `paired_speedup`; percentile bootstrap of medians, Wilcox, Introduction to Robust Estimation, 4th ed. 2017, section 5.4.
    """
    ours, theirs = _speedups(*candidate), _speedups(*other)
    if any(map(len, prompts)):
        mine, its = (paired_speedup(*times, level, *how) for times, *how in zip((candidate, other), runs, prompts, strict=True))
        ratio = mine.value / its.value
        width = math.hypot(*(math.log(part.high / part.value) for part in (mine, its)))
        return Estimate(ratio, ratio * math.exp(-width), ratio * math.exp(width))
    if min(map(len, runs)) > 1:
        relative = ratio_over((ours, runs[0]), (theirs, runs[1]), level)
        absolute = ratio_over((other[0], runs[1]), (candidate[0], runs[0]), level)
        return Estimate(relative.value, min(relative.low, absolute.low), max(relative.high, absolute.high))
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
