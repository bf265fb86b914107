"""A mean over crossed draws and windows: its interval holds the true mean, whichever of the two varies more."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from slimbench.harness.stats.crossed import crossed_mean


@pytest.mark.parametrize(
    ("between_draws", "between_windows", "rest"),
    [(0.0, 1.0, 1.0), (0.01, 0.05, 0.05), (0.02, 0.05, 0.05), (0.05, 0.05, 0.05), (0.01, 0.01, 0.1), (0.02, 0.2, 0.1)],
)
def test_the_interval_covers_the_mean_of_other_draws_and_windows(between_draws: float, between_windows: float, rest: float) -> None:
    rng, trials, held = np.random.default_rng(0), 2000, 0
    for _ in range(trials):
        parts = (
            between_draws * rng.standard_normal((3, 1)),
            between_windows * rng.standard_normal((1, 64)),
            rest * rng.standard_normal((3, 64)),
        )
        _, low, high = crossed_mean(sum(parts))  # type: ignore[arg-type]
        held += low <= 0 <= high
    assert 0.93 <= held / trials <= 0.975


def test_one_draw_is_student_over_windows_and_draws_that_agree_add_nothing() -> None:
    values = np.random.default_rng(1).normal(0.3, 0.1, 40)
    want = stats.ttest_1samp(values, 0).confidence_interval()
    for draws in (values[None], np.stack([values] * 3)):
        assert crossed_mean(draws) == pytest.approx((values.mean(), want.low, want.high))


def test_draws_that_differ_alike_on_all_windows_are_student_over_draws() -> None:
    draws = np.array([0.1, 0.2, 0.6])
    want = stats.ttest_1samp(draws, 0).confidence_interval()
    assert crossed_mean(np.repeat(draws[:, None], 50, 1)) == pytest.approx((0.3, want.low, want.high))


def test_nothing_is_said_of_one_window() -> None:
    with pytest.raises(ValueError, match="two windows"):
        crossed_mean(np.zeros((3, 1)))
