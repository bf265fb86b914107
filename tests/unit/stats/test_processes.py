"""Several processes: their medians are the samples, and the interval holds the next process."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from slimbench.harness.stats.processes import middle_over, ratio_over, split
from slimbench.harness.stats.speedups import indirect_speedup, middle, paired_speedup

TRIALS = 4000


def times(rng: np.random.Generator, processes: int, runs: int, between: float, within: float, true: float = 10.0) -> np.ndarray:
    """Samples of processes, shape [processes * runs]."""
    shifts = rng.normal(0, between, (processes, 1))
    return true * np.exp(shifts + rng.normal(0, within, (processes, runs))).ravel()


@pytest.mark.parametrize(("processes", "between"), [(3, 0.03), (5, 0.03), (3, 0.0), (5, 0.005)])
def test_the_interval_covers_what_processes_vary_around(processes: int, between: float) -> None:
    rng, runs = np.random.default_rng(1), [9] * processes
    found = [middle_over(times(rng, processes, 9, between, 0.01), runs) for _ in range(TRIALS)]
    covered = np.mean([low <= 10 <= high for _, low, high in found])
    assert 0.94 <= covered <= 0.96
    one = [middle(times(rng, 1, 9 * processes, between, 0.01)) for _ in range(TRIALS // 10)]
    assert between < 0.02 or np.mean([low <= 10 <= high for _, low, high in one]) < 0.5, "one process would not"


def test_equal_rows_are_called_different_in_five_of_a_hundred_at_most() -> None:
    rng, runs = np.random.default_rng(2), [8] * 3
    apart = 0
    for _ in range(TRIALS):
        ours, theirs = (times(rng, 3, 8, 0.03, 0.01) for _ in range(2))
        ratio, low, high = ratio_over((ours, runs), (theirs, runs))
        apart += not low <= 1 <= high
        assert math.isclose(1 / ratio, ratio_over((theirs, runs), (ours, runs)).value)
    assert apart / TRIALS <= 0.05


def test_the_numbers_are_those_of_scipy_on_the_logarithms_of_the_medians() -> None:
    rng = np.random.default_rng(3)
    ours, theirs = times(rng, 4, 5, 0.03, 0.01), times(rng, 3, 7, 0.05, 0.01, true=12.0)
    logs = [np.log(np.median(part.reshape(count, -1), axis=1)) for part, count in ((ours, 4), (theirs, 3))]
    alone = stats.ttest_1samp(logs[0], 0).confidence_interval()
    assert middle_over(ours, [5] * 4)[1:] == pytest.approx(np.exp([alone.low, alone.high]))
    welch = stats.ttest_ind(*logs, equal_var=False).confidence_interval()
    assert ratio_over((ours, [5] * 4), (theirs, [7] * 3))[1:] == pytest.approx(np.exp([welch.low, welch.high]))


def measured(rng: np.random.Generator, true: float, states: float, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Times of a candidate and of its reference in three processes of eight runs, on a machine that was busier or calmer meanwhile.

    Args:
        true: Speed-up on a calm machine.
        states: Standard deviation of the logarithm of what others slow the reference down by, between measurements; a third of it between
            processes.
        share: Of that slowness which the candidate does not suffer.
    """
    busy = rng.normal(0, states) + rng.normal(0, states / 3, (3, 1)) + np.zeros((3, 8))
    reference = 22 * np.exp(busy + rng.normal(0, 0.01, (3, 8)))
    return (22 / true * np.exp((1 - share) * busy + rng.normal(0, 0.02, (3, 1)) + rng.normal(0, 0.01, (3, 8)))).ravel(), reference.ravel()


RUNS = ([8] * 3, [8] * 3)


@pytest.mark.parametrize("states", [0.0, 0.05, 0.15])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_equal_rows_of_a_busy_and_a_calm_hour_are_called_different_in_five_of_a_hundred_at_most(states: float, share: float) -> None:
    """Where the hour matters, the plain ratio of the speed-ups errs several times as often."""
    rng = np.random.default_rng(6)
    apart = plain = 0
    for _ in range(TRIALS // 2):
        ours, theirs = (measured(rng, 2.0, states, share) for _ in range(2))
        ratio, low, high = indirect_speedup(ours, theirs, runs=RUNS)
        relative = ratio_over((ours[1] / ours[0], RUNS[0]), (theirs[1] / theirs[0], RUNS[1]))
        apart += not low <= 1 <= high
        plain += not relative.low <= 1 <= relative.high
        assert low <= relative.low and high >= relative.high and ratio == relative.value
    assert apart / (TRIALS // 2) <= 0.05
    assert states * share < 0.1 or plain / (TRIALS // 2) > 0.2


@pytest.mark.parametrize(("states", "least"), [(0.0, 0.9), (0.05, 0.5)])
def test_rows_that_differ_by_a_sixth_are_told_apart(states: float, least: float) -> None:
    rng = np.random.default_rng(5)
    found = [indirect_speedup(measured(rng, 2.3, states, 0.3), measured(rng, 2.0, states, 0.3), runs=RUNS) for _ in range(400)]
    assert np.mean([low > 1 for _, low, _ in found]) > least
    assert np.median([value for value, _, _ in found]) == pytest.approx(1.15, rel=0.01)


def test_speed_ups_of_processes_pair_within_and_compare_between_them() -> None:
    rng = np.random.default_rng(4)
    drift = np.exp(rng.normal(0, 0.3, 24))
    ours, theirs = 10 * drift, 20 * drift * np.exp(rng.normal(0, 0.001, 24))
    assert paired_speedup(ours, theirs, runs=[8, 8, 8]) == pytest.approx((2, 2, 2), rel=5e-3)
    both = indirect_speedup((ours, theirs), (ours, theirs), runs=([8, 8, 8], [8, 8, 8]))
    assert both.value == 1 and both.low < 1 < both.high


@pytest.mark.parametrize("runs", [[5], [], [3, 3], [6, 0]])
def test_what_does_not_fit_is_said(runs: list[int]) -> None:
    with pytest.raises(ValueError, match="process"):
        middle_over([1.0] * 5, runs)


def test_samples_are_given_back_by_process() -> None:
    assert [part.tolist() for part in split([1, 2, 3, 4, 5], [2, 3])] == [[1, 2], [3, 4, 5]]
