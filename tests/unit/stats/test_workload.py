"""Speed-ups over prompts whose work differs: the ratio, and that its interval keeps its promise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from slimbench.harness.stats.speedups import indirect_speedup, paired_speedup
from slimbench.harness.stats.workload import prompt_speedups, spread_within, workload_mean, workload_speedup


def drawn(
    rng: np.random.Generator, spread: float, process: float, prompts: int = 24, processes: int = 3
) -> tuple[list[float], list[float], list[int], list[int]]:
    """Times of candidate and reference, prompts of the pairs and pairs of each process; two pairs a prompt, and 1.25 on average."""
    ours, theirs, numbers, runs = [], [], [], []
    for index in range(processes):
        moved = rng.normal(0, process)
        for prompt in range(index, prompts, processes):
            reference = 40 * rng.lognormal(0, 0.05)
            candidate = 32 * rng.lognormal(-(spread**2) / 2, spread) * math.exp(moved)
            for _ in range(2):
                ours.append(candidate * rng.lognormal(0, 0.01))
                theirs.append(reference * rng.lognormal(0, 0.01))
                numbers.append(prompt)
        runs.append(2 * len(range(index, prompts, processes)))
    return ours, theirs, numbers, runs


@pytest.mark.parametrize(("spread", "process"), [(0.3, 0.0), (0.3, 0.03), (0.1, 0.03), (0.0, 0.03), (0.5, 0.0)])
def test_the_interval_holds_the_ratio_as_often_as_it_says(spread: float, process: float) -> None:
    rng, held = np.random.default_rng(5), 0
    for _ in range(1000):
        ours, theirs, prompts, runs = drawn(rng, spread, process)
        found = workload_speedup(ours, theirs, prompts, runs)
        held += found.low <= 1.25 * math.exp(0.05**2 / 2) <= found.high
    assert 0.95 <= held / 1000 <= 0.995


def test_a_candidate_that_is_the_reference_has_one() -> None:
    rng, held = np.random.default_rng(6), 0
    for _ in range(400):
        times = 40 * rng.lognormal(0, 0.3, 24).repeat(2)
        noise = [times * rng.lognormal(0, 0.01, 48) for _ in range(2)]
        found = workload_speedup(*noise, prompts=np.arange(24).repeat(2).tolist(), runs=[16, 16, 16])
        held += found.low <= 1 <= found.high
    assert held / 400 >= 0.95


def test_it_is_the_ratio_of_sums_and_not_the_mean_of_ratios() -> None:
    ours, theirs, prompts = [10.0, 10.0, 10.0, 100.0, 100.0, 100.0], [10.0, 10.0, 10.0, 50.0, 50.0, 50.0], [0, 1, 2, 3, 4, 5]
    found = workload_speedup(ours, theirs, prompts)
    assert found.value == pytest.approx(180 / 330)
    assert prompt_speedups(ours, theirs, prompts).tolist() == [1, 1, 1, 0.5, 0.5, 0.5]
    assert found.low < found.value < found.high
    assert found == paired_speedup(ours, theirs, prompts=prompts)


def test_a_prompt_that_was_timed_more_often_counts_no_more() -> None:
    once = workload_speedup([10.0] * 6, [20.0, 30, 10, 20, 20, 20], [0, 1, 2, 3, 4, 5])
    often = workload_speedup([10.0] * 8, [20.0, 30, 30, 30, 10, 20, 20, 20], [0, 1, 1, 1, 2, 3, 4, 5])
    assert often.value == pytest.approx(once.value) and often.low == pytest.approx(once.low)


def test_few_prompts_carry_no_interval_and_bad_times_are_refused() -> None:
    found = workload_speedup([10.0] * 4, [20.0] * 4, [0, 0, 1, 1])
    assert found.value == 2 and math.isnan(found.low)
    with pytest.raises(ValueError, match="above zero"):
        workload_speedup([0.0, 1.0], [1.0, 1.0], [0, 1])
    with pytest.raises(ValueError, match="needs a prompt"):
        workload_speedup([1.0, 1.0], [1.0, 1.0], [0])


def test_two_workloads_are_compared_through_their_reference() -> None:
    rng = np.random.default_rng(7)
    ours, theirs, prompts, runs = drawn(rng, 0.2, 0.0)
    fast = [time / 2 for time in ours]
    found = indirect_speedup((fast, theirs), (ours, theirs), runs=(runs, runs), prompts=(prompts, prompts))
    assert found.value == pytest.approx(2)
    alone = workload_speedup(ours, theirs, prompts, runs)
    assert math.log(found.high / 2) == pytest.approx(math.sqrt(2) * math.log(alone.high / alone.value))


def test_no_more_prompts_than_processes_carry_no_interval() -> None:
    found = workload_speedup([1.0] * 6, [2.0] * 6, [0, 1, 2, 3, 4, 5], [1] * 6)
    assert found.value == 2 and math.isnan(found.low) and math.isnan(found.high)


def test_the_mean_time_is_that_of_prompts_and_its_interval_holds_it() -> None:
    value, low, high = workload_mean([10.0, 10, 10, 40, 20, 20, 20, 20], [0, 0, 0, 1, 2, 3, 4, 5])
    assert value == pytest.approx((10 + 40 + 4 * 20) / 6) and low < value < high, "a prompt that was timed thrice counts once"
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        means = rng.normal(30, 5, 12)
        found = workload_mean(np.repeat(means, 2) + rng.normal(0, 0.5, 24), np.repeat(np.arange(12), 2).tolist())
        held += found.low <= 30 <= found.high
    assert 930 <= held <= 970
    assert math.isnan(workload_mean([1.0, 2.0], [0, 1]).low)


def test_the_interval_of_a_mean_time_knows_that_processes_differ() -> None:
    """Prompts of one process share its pace."""
    rng, held, runs = np.random.default_rng(2), 0, [16] * 3
    for _ in range(500):
        pace = np.repeat(np.exp(rng.normal(0, 0.03, 3)), 8)
        means = rng.normal(30, 1, 24) * pace
        times, prompts = np.repeat(means, 2) + rng.normal(0, 0.1, 48), np.repeat(np.arange(24), 2).tolist()
        found = workload_mean(times, prompts, runs)
        held += found.low <= 30 <= found.high
        assert found.value == workload_mean(times, prompts).value
    assert held >= 465
    alone = [workload_mean(np.repeat(means, 2), prompts, given) for given in ([], runs)]
    assert alone[1].high - alone[1].low > 2 * (alone[0].high - alone[0].low)


def test_what_repeats_say_does_not_know_how_prompts_differ() -> None:
    """Half-widths shrink with repeats, and are as wide as the repeats of one prompt scatter, however different the prompts are."""
    rng = np.random.default_rng(1)

    def half(prompts: int, repeats: int, between: float) -> float:
        speedups = np.repeat(rng.lognormal(0.3, between, prompts), repeats) * rng.lognormal(0, 0.05, prompts * repeats)
        found = spread_within(np.full(len(speedups), 30.0), 30.0 * speedups, np.repeat(np.arange(prompts), repeats).tolist())
        assert found is not None
        return found

    assert half(100, 4, 0.5) == pytest.approx(1.96 * 0.05 / 20, rel=0.15) == pytest.approx(half(100, 4, 0.0), rel=0.3)
    assert spread_within([1.0] * 8, [2.0] * 8, list(range(8))) is None, "without repeats nothing is known"
