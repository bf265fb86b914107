"""Estimators: known values, edge cases, and coverage of their 95 % intervals by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binom, multinomial, quantile_test

from slimbench.harness.stats import bootstrap, speedups
from slimbench.harness.stats import intervals as stats

RUNS = 1000
PAIRED_SAMPLES = [stats.paired_delta_interval, stats.perplexity_ratio_interval, speedups.paired_speedup]


def covers(interval: tuple[float, float], truth: float) -> bool:
    return interval[0] <= truth <= interval[1]


def draw(rng: np.random.Generator) -> int:
    """A seed for the bootstrap: few resamples of one fixed draw would shift the coverage of every run alike."""
    return int(rng.integers(2**31))


def coverage(interval: Callable[[np.random.Generator], tuple[float, float]], truth: float, runs: int = RUNS) -> float:
    rng = np.random.default_rng(7)
    return sum(covers(interval(rng), truth) for _ in range(runs)) / runs


@pytest.mark.parametrize("n", [6, 9, 20, 25, 100])
def test_median_interval_is_the_tightest_pair_of_order_statistics_with_95_percent(n: int) -> None:
    low, high = stats.median_interval(np.random.default_rng(n).permutation(np.arange(1, n + 1)))
    assert low + high == n + 1
    assert 1 - 2 * binom.cdf(low - 1, n, 0.5) >= 0.95 > 1 - 2 * binom.cdf(low, n, 0.5)


@pytest.mark.parametrize("n", range(1, 6))
def test_median_interval_of_few_samples_is_their_range(n: int) -> None:
    samples = np.random.default_rng(n).random(n)
    assert stats.median_interval(samples) == (samples.min(), samples.max())


def test_perplexity_is_the_exponential_of_the_mean() -> None:
    assert stats.perplexity([1.0, 3.0]) == pytest.approx(math.exp(2))
    assert stats.perplexity([800.0]) == math.inf


def test_bootstrap_is_seeded() -> None:
    nll = np.random.default_rng(0).normal(3, 0.3, 32)
    assert stats.perplexity_interval(nll, seed=1) == stats.perplexity_interval(nll, seed=1)
    assert stats.perplexity_interval(nll, seed=1) != stats.perplexity_interval(nll, seed=2)


def test_a_higher_level_gives_a_wider_interval() -> None:
    nll = np.random.default_rng(0).normal(3, 0.3, 32)
    narrow, wide = stats.perplexity_interval(nll, level=0.8), stats.perplexity_interval(nll, level=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_one_window_has_no_interval_and_equal_windows_have_none_to_speak_of() -> None:
    assert all(map(math.isnan, stats.perplexity_interval([3.0])))
    assert stats.perplexity_interval([3.0, 3.0]) == (math.exp(3), math.exp(3))


def test_pairing_makes_the_ratio_sharper_than_its_parts() -> None:
    rng = np.random.default_rng(3)
    text = rng.normal(3, 0.5, 40)
    ours, theirs = text + 0.1 + rng.normal(0, 0.02, 40), text
    ratio, low, high = stats.perplexity_ratio_interval(ours, theirs)
    assert ratio == pytest.approx(stats.perplexity(ours) / stats.perplexity(theirs))
    assert low < math.exp(0.1) < high
    alone = stats.perplexity_interval(theirs)
    assert high / low < 1.02 < alone[1] / alone[0]


def test_speedup_is_reference_over_candidate() -> None:
    ratio, low, high = speedups.paired_speedup([10.0] * 8, [20.0, 22.0, 18.0, 20.0, 20.0, 21.0, 19.0, 20.0])
    assert ratio == 2.0
    assert (low, high) == (1.8, 2.2)


def test_the_error_of_accuracy_weighs_tasks_not_items_and_needs_more_than_one_item() -> None:
    tasks = [[1.0, 0.0] * 50, [1.0] * 10]
    assert stats.accuracy_se(tasks) == pytest.approx(np.std(tasks[0], ddof=1) / math.sqrt(100) / 2)
    assert math.isnan(stats.accuracy_se([[1.0], [0.0, 1.0]]))


def test_accuracy_delta_is_paired_within_tasks() -> None:
    reference = [[1.0, 0.0] * 100, [1.0] * 50 + [0.0] * 50]
    candidate = [[1.0, 0.0] * 90 + [0.0] * 20, reference[1]]
    delta, low, high = stats.accuracy_delta_interval(candidate, reference)
    assert delta == pytest.approx(-0.025)
    assert low < delta < high <= 0


@pytest.mark.parametrize("function", [stats.median_interval, stats.perplexity_interval, stats.perplexity])
@pytest.mark.parametrize("samples", [[], [1.0, math.nan], [1.0, math.inf], [[1.0, 2.0]]])
def test_bad_samples_are_refused(function: Callable[[object], object], samples: list[float]) -> None:
    with pytest.raises(ValueError, match="sample"):
        function(samples)


@pytest.mark.parametrize("function", PAIRED_SAMPLES)
def test_samples_without_partner_are_refused(function: Callable[[object, object], object]) -> None:
    with pytest.raises(ValueError, match="2 against 3"):
        function([1.0, 2.0], [1.0, 2.0, 3.0])


def test_impossible_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="above zero"):
        speedups.paired_speedup([0.0, 1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="task"):
        stats.accuracy_se([])
    with pytest.raises(ValueError):
        stats.accuracy_delta_interval([[1.0]], [[1.0], [0.0]])


def test_coverage_of_the_median() -> None:
    assert 0.93 <= coverage(lambda rng: stats.median_interval(rng.lognormal(0, 0.5, 25)), 1.0) <= 0.97


@pytest.mark.parametrize("windows", [10, 40])
def test_coverage_of_perplexity(windows: int) -> None:
    assert 0.93 <= coverage(lambda rng: stats.perplexity_interval(rng.normal(3, 0.4, windows), resamples=1000), math.exp(3)) <= 0.97


def test_coverage_of_the_perplexity_ratio() -> None:
    def interval(rng: np.random.Generator) -> tuple[float, float]:
        text = rng.normal(3, 0.5, 32)
        return stats.perplexity_ratio_interval(text + rng.gamma(4, 0.05, 32), text, resamples=1000)[1:]

    assert 0.93 <= coverage(interval, math.exp(0.2)) <= 0.97


def test_coverage_of_the_error_of_accuracy() -> None:
    chances = (0.3, 0.55, 0.7)

    def interval(rng: np.random.Generator) -> tuple[float, float]:
        tasks = [(rng.random(n) < p).astype(float) for p, n in zip(chances, (60, 120, 240), strict=True)]
        mean, reach = float(np.mean([task.mean() for task in tasks])), 1.96 * stats.accuracy_se(tasks)
        return mean - reach, mean + reach

    assert 0.93 <= coverage(interval, float(np.mean(chances))) <= 0.97


def test_coverage_of_the_accuracy_difference() -> None:
    def interval(rng: np.random.Generator) -> tuple[float, float]:
        draws = [rng.random(n) for n in (80, 160)]
        ours, theirs = [(d < 0.5).astype(float) for d in draws], [(d < 0.6).astype(float) for d in draws]
        return stats.accuracy_delta_interval(ours, theirs)[1:]

    assert 0.93 <= coverage(interval, -0.1) <= 0.97


@pytest.mark.parametrize(
    ("sizes", "lost", "won"),
    [
        ((32,) * 5, 0.01, 0.0),
        ((32,) * 5, 0.04, 0.02),
        ((64,) * 10, 0.004, 0.001),
        ((64,) * 10, 0.2, 0.1),
        ((2000, 60, 60, 60), 0.02, 0.005),
    ],
)
def test_coverage_of_the_accuracy_difference_holds_where_few_answers_change(sizes: tuple[int, ...], lost: float, won: float) -> None:
    def interval(rng: np.random.Generator) -> tuple[float, float]:
        draws = [rng.random(n) for n in sizes]
        theirs = [((d < 0.6) | (d > 1 - lost)).astype(float) for d in draws]
        ours = [(d < 0.6 + won).astype(float) for d in draws]
        return stats.accuracy_delta_interval(ours, theirs)[1:]

    assert coverage(interval, won - lost) >= 0.93


def test_no_changed_answer_leaves_room_for_some() -> None:
    delta, low, high = stats.accuracy_delta_interval([[1.0, 0.0] * 16] * 5, [[1.0, 0.0] * 16] * 5)
    assert delta == 0 and -0.03 < low < -0.01 < 0.01 < high < 0.03


def test_the_interval_of_one_task_is_that_of_its_flips() -> None:
    theirs, ours = [1.0] * 40 + [0.0] * 60, [1.0] * 33 + [0.0] * 64 + [1.0] * 3
    assert stats.accuracy_delta_interval([ours], [theirs])[1:] == pytest.approx(stats.flips_interval(7, 3, 100))


def test_a_against_a_is_rarely_called_faster_even_when_the_machine_drifts() -> None:
    def interval(rng: np.random.Generator) -> tuple[float, float]:
        drift = np.linspace(1.0, 1.5, 25)
        return speedups.paired_speedup(*(drift * rng.lognormal(3, 0.05, 25) for _ in range(2)))[1:]

    assert 0.95 <= coverage(interval, 1.0) <= 0.97


def test_document_perplexity_weighs_documents_by_their_length() -> None:
    mean, low, high = stats.document_perplexity_interval([30.0, 400.0], [10.0, 100.0])
    assert mean == pytest.approx(math.exp(430 / 110))
    assert low == pytest.approx(math.exp(3)) and high == pytest.approx(math.exp(4))
    assert all(map(math.isnan, stats.document_perplexity_interval([30.0], [10.0])[1:]))
    with pytest.raises(ValueError, match="unit"):
        stats.document_perplexity_interval([1.0, 2.0], [0.0, 1.0])


def test_the_ratio_of_document_perplexities_is_paired() -> None:
    rng = np.random.default_rng(3)
    words = rng.integers(50, 500, 30).astype(float)
    theirs = words * rng.normal(4, 0.5, 30)
    ours = theirs + words * rng.normal(0.1, 0.01, 30)
    ratio, low, high = stats.document_ratio_interval(ours, theirs, words)
    alone = [stats.document_perplexity_interval(nll, words) for nll in (ours, theirs)]
    assert ratio == pytest.approx(alone[0][0] / alone[1][0])
    assert low < math.exp(0.1) < high < 1.02 * low and alone[0][2] > 1.1 * alone[0][1]


@pytest.mark.parametrize(("documents", "lengths"), [(10, 0.5), (40, 1.2)])
def test_coverage_of_the_ratio_of_document_perplexities(documents: int, lengths: float) -> None:
    def interval(rng: np.random.Generator) -> tuple[float, float]:
        words = rng.lognormal(5, lengths, documents)
        theirs = words * rng.normal(4, 0.5, documents)
        ours = theirs + words * (0.3 + rng.normal(0, 0.1, documents))
        return stats.document_ratio_interval(ours, theirs, words, resamples=600, seed=draw(rng))[1:]

    assert 0.93 <= coverage(interval, math.exp(0.3), runs=2000) <= 0.97


def test_flips_interval_holds_the_difference_and_shrinks_with_items() -> None:
    low, high = stats.flips_interval(14, 4, 100)
    assert low < -0.1 < high < 0
    assert stats.flips_interval(0, 0, 64)[0] < 0 < stats.flips_interval(0, 0, 64)[1], "no change is no proof of equality"
    assert np.diff(stats.flips_interval(140, 40, 1000)) < high - low
    with pytest.raises(ValueError, match="do not fit"):
        stats.flips_interval(3, 2, 4)


@pytest.mark.parametrize("lost_and_won", [(0.02, 0.02), (0.15, 0.15), (0.2, 0.1), (0.3, 0.1)])
def test_exact_coverage_of_the_flips_interval(lost_and_won: tuple[float, float]) -> None:
    """Every outcome by its probability, so without simulation error."""
    items, (lost, won) = 48, lost_and_won
    counts = np.array([(i, j, items - i - j) for i in range(items + 1) for j in range(items + 1 - i)])
    chances = multinomial.pmf(counts, items, (lost, won, 1 - lost - won))
    likely = chances > 1e-7
    for level, worst in ((0.95, 0.94), (0.995, 0.993)):
        inside = [covers(stats.flips_interval(int(i), int(j), items, level), won - lost) for i, j, _ in counts[likely]]
        assert chances[likely] @ inside >= worst


@pytest.mark.parametrize(("tasks", "items", "redrawn"), [(1, 64, 0.1), (5, 32, 0.2)])
def test_a_against_a_is_rarely_called_more_accurate(tasks: int, items: int, redrawn: float) -> None:
    def interval(rng: np.random.Generator) -> tuple[float, float]:
        theirs = rng.random((tasks, items)) < 0.5
        ours = np.where(rng.random((tasks, items)) < redrawn, rng.random((tasks, items)) < 0.5, theirs)
        return stats.accuracy_delta_interval(ours.astype(float), theirs.astype(float))[1:]

    assert coverage(interval, 0.0) >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / RUNS)


def test_indirect_speedup_is_the_ratio_of_both_speedups() -> None:
    reference = [20.0, 22.0, 18.0, 20.0, 20.0, 21.0, 19.0, 20.0]
    ratio, low, high = speedups.indirect_speedup(([10.0] * 8, reference), ([5.0] * 6, reference[:6]))
    assert ratio == 0.5
    assert 0.4 < low <= 0.5 <= high < 0.6
    assert all(map(math.isnan, speedups.indirect_speedup(([10.0] * 5, [20.0] * 5), ([5.0] * 6, reference[:6]))[1:]))
    with pytest.raises(ValueError, match="above zero"):
        speedups.indirect_speedup(([0.0, 1.0], [1.0, 1.0]), ([1.0, 1.0], [1.0, 1.0]))


@pytest.mark.parametrize("pairs", [(6, 6), (21, 30)])
def test_coverage_of_the_indirect_speedup_between_machines_in_different_states(pairs: tuple[int, int]) -> None:
    def interval(rng: np.random.Generator) -> tuple[float, float]:
        slow, fast = np.linspace(1.2, 1.5, pairs[0]), np.linspace(1.0, 0.9, pairs[1])
        times = [(s * rng.lognormal(1, 0.05, len(s)), s * rng.lognormal(2, 0.05, len(s))) for s in (slow, fast)]
        return speedups.indirect_speedup(times[0], times[1], resamples=500, seed=draw(rng))[1:]

    assert 0.93 <= coverage(interval, 1.0) <= 0.98


@pytest.mark.parametrize("count", [2, 5, 48, 301])
def test_shared_draws_give_the_interval_of_scipy(count: int) -> None:
    values = np.random.default_rng(count).lognormal(size=count)
    level = bootstrap.expanded_level(count, 0.95)
    assert stats.mean_interval(values, seed=7) == pytest.approx(
        bootstrap.percentile_interval((values,), np.mean, level, bootstrap.RESAMPLES, 7), rel=1e-12
    )
    theirs = quantile_test(values, p=0.5).confidence_interval(0.95)
    if count > stats.FEWEST_FOR_MEDIAN:
        assert stats.median_interval(values) == (theirs.low, theirs.high)
