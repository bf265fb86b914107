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
