"""Speed-ups over prompts whose work differs: each is a block, and by what they differ a new workload would differ, too."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from slimbench.harness.stats.bootstrap import UNDEFINED, Estimate, Samples, normal_quantile, paired_values
from slimbench.harness.stats.processes import split

FEWEST = 6
"""Prompts that carry an interval."""
PROCESS = 0.03
"""Standard deviation of the logarithms of speed-ups between processes, at least: 2 to 4 % were seen, which three of them cannot show."""


def workload_speedup(
    candidate_ms: Samples, reference_ms: Samples, prompts: Sequence[int], runs: Sequence[int] = (), level: float = 0.95
) -> Estimate:
    """How many times faster a whole workload is: Σ reference / Σ candidate of the mean times of each prompt.

    The interval is one over prompts, as clusters, and over processes, which have a share of the prompts each: with the residuals
    e_i = r_i − ρ c_i of the ratio ρ of their process, prompts give log ρ the variance Σ e_i² / (n (n − p) r̄²) of n prompts in p processes,
    Student's; to it comes what processes differ by more than their prompts do (method of moments, Student's for p), or `PROCESS`.

    Args:
        candidate_ms: Times of the candidate, shape [pairs].
        reference_ms: Times of the reference taken next to them, shape [pairs].
        prompts: Of each pair the number of its prompt.
        runs: How many pairs each process has; empty for one process.
        level: Confidence, 0..1.

    Returns:
        Ratio, lower bound, upper bound; no bounds (`nan`) for fewer than six prompts, or no more than there are processes.

    Raises:
        ValueError: Different numbers of samples, none, or a time that is not finite and above zero.

    Source: W. G. Cochran, Sampling Techniques, 3rd ed. 1977, section 6.3 (ratio estimator, linearized) and 10.6 (stages of sampling).
    """
    ours, theirs = paired_values(candidate_ms, reference_ms)
    if min(ours.min(), theirs.min()) <= 0 or len(prompts) != len(ours):
        raise ValueError("each pair needs a prompt, and times must be above zero")
    numbers = np.asarray(prompts)
    wanted, mine, its = _means(numbers, ours, theirs)
    ratio = float(its.sum() / mine.sum())
    count = len(wanted)
    parts = _by_process(numbers, runs, ours, theirs)
    if count < FEWEST or count <= len(parts):
        return Estimate(ratio, *UNDEFINED)
    ratios = [float(other.sum() / own.sum()) for _, own, other in parts]
    residuals = np.concatenate([other - part * own for part, (_, own, other) in zip(ratios, parts, strict=True)])
    within = float(residuals @ residuals) / (count - len(parts)) / its.mean() ** 2
    between = float(np.log(ratios).var(ddof=1)) if len(parts) > 1 else 0.0
    width = math.sqrt(_reach(within, between, [len(there) for there, *_ in parts], PROCESS**2, level))
    return Estimate(ratio, ratio * math.exp(-width), ratio * math.exp(width))


def workload_mean(times_ms: Samples, prompts: Sequence[int], runs: Sequence[int] = (), level: float = 0.95) -> Estimate:
    """Mean time over prompts, of the mean times of each.

    The interval is one over prompts, as clusters, and over processes, as that of `workload_speedup`: a time moves with its process, the
    ratio of two that are taken next to each other hardly.

    Args:
        times_ms: Shape [samples].
        prompts: Of each sample the number of its prompt.
        runs: How many samples each process has; empty for one process.

    Raises:
        ValueError: No samples, or not as many prompts.
    """
    values, numbers = np.asarray(times_ms, dtype=np.float64), np.asarray(prompts)
    if not len(values) or len(values) != len(numbers):
        raise ValueError("each time needs a prompt")
    parts = [means for _, means in _by_process(numbers, runs, values)]
    joined = np.concatenate(parts)
    mean, count = float(joined.mean()), len(joined)
    if count < FEWEST or count <= len(parts):
        return Estimate(mean, *UNDEFINED)
    residuals = np.concatenate([part - part.mean() for part in parts])
    within = float(residuals @ residuals) / (count - len(parts))
    between = float(np.var([part.mean() for part in parts], ddof=1)) if len(parts) > 1 else 0.0
    width = math.sqrt(_reach(within, between, [len(part) for part in parts], (mean * PROCESS) ** 2, level))
    return Estimate(mean, mean - width, mean + width)


def _reach(within: float, between: float, counts: Sequence[int], least: float, level: float) -> float:
    """Square of half an interval.

    Args:
        within: Variance of prompts of the same process.
        between: Variance of the values of processes, to which their prompts add.
        counts: Prompts of each process.
        least: Variance between processes that is taken for granted.
    """
    count, processes = sum(counts), len(counts)
    reach = float(stats.t.ppf((1 + level) / 2, count - processes)) ** 2 * within / count
    if processes > 1:
        beyond = max(0.0, between - float(np.mean([within / there for there in counts])))
        seen = float(stats.t.ppf((1 + level) / 2, processes - 1)) ** 2 * beyond
        reach += max(seen, normal_quantile(level) ** 2 * least) / processes
    return reach


def spread_within(candidate_ms: Samples, reference_ms: Samples, prompts: Sequence[int], level: float = 0.95) -> float | None:
    """Half of the interval that repeats of the same prompts alone give to the mean logarithm of the speed-up; None without repeats.

    It says how far repeating has come. What prompts differ by does not get less with it.
    """
    ours, theirs = paired_values(candidate_ms, reference_ms)
    ratios, numbers = np.log(theirs / ours), np.asarray(prompts)
    there, place = np.unique(numbers, return_inverse=True)
    free = len(ratios) - len(there)
    if free < FEWEST - 1:
        return None
    means = np.bincount(place, ratios) / np.bincount(place)
    within = float(((ratios - means[place]) ** 2).sum()) / free
    return float(stats.t.ppf((1 + level) / 2, free)) * math.sqrt(within / len(ratios))


def _by_process(prompts: NDArray[np.int64], runs: Sequence[int], *samples: NDArray[np.float64]) -> list[tuple[NDArray[np.float64], ...]]:
    """Of each process its prompts, and the mean times of each of them."""
    if len(runs) < 2:
        return [_means(prompts, *samples)]
    places = np.split(prompts, np.cumsum(runs)[:-1])
    return [_means(*part) for part in zip(places, *(split(times, runs) for times in samples), strict=True)]


def prompt_speedups(candidate_ms: Samples, reference_ms: Samples, prompts: Sequence[int]) -> NDArray[np.float64]:
    """Reference / candidate of the mean times of each prompt, in the order of their numbers."""
    ours, theirs = paired_values(candidate_ms, reference_ms)
    _, mine, its = _means(np.asarray(prompts), ours, theirs)
    return np.asarray(its / mine)


def _means(prompts: NDArray[np.int64], *samples: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """The prompts that there are, and the mean of each kind of sample by prompt."""
    there, place, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    return (there.astype(np.float64), *(np.bincount(place, values) / counts for values in samples))
