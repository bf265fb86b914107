"""Tests of significance and shared ranks: known values, false positives and power by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats as scipy_stats
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.multitest import multipletests

from slimbench.harness.schema.identity import Status
from slimbench.harness.stats import intervals as stats
from slimbench.harness.stats import significance
from slimbench.leaderboard.rows.ranks import items_ranks, places, windows_ranks
from slimbench.leaderboard.rows.rows import rows
from tests.support.board_records import Spec, board, records

Draw = Callable[[np.random.Generator, tuple[int, int]], NDArray[np.float64]]
NOISE: dict[str, Draw] = {
    "normal": lambda rng, shape: rng.normal(0, 1, shape),
    "skewed": lambda rng, shape: rng.gamma(0.5, 1, shape),
    "heavy": lambda rng, shape: rng.lognormal(0, 1, shape),
}


def slack(runs: int) -> float:
    """5 % and three standard errors of a simulated share of 5 %."""
    return 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


def test_paired_p_value_is_that_of_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(3, 1, 16), rng.normal(3.5, 1, 16)
    assert significance.paired_p_value(ours, theirs) == pytest.approx(scipy_stats.ttest_rel(ours, theirs).pvalue)
    many = rng.normal(0.2, 1, (7, 16))
    assert significance.paired_p_values(many) == pytest.approx(scipy_stats.ttest_1samp(many, 0, axis=1).pvalue)


def test_identical_samples_do_not_differ_and_one_item_says_nothing() -> None:
    assert significance.paired_p_value([1.0, 2.0, 4.0], [1.0, 2.0, 4.0]) == 1.0
    assert math.isnan(significance.paired_p_value([1.0], [2.0]))
    with pytest.raises(ValueError, match="2 against 3"):
        significance.paired_p_value([1.0, 2.0], [1.0, 2.0, 3.0])


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("windows", [8, 16, 64])
def test_a_against_a_is_rarely_called_different(windows: int, noise: str) -> None:
    rng, runs = np.random.default_rng(windows), 20_000
    differences = NOISE[noise](rng, (runs, windows)) - NOISE[noise](rng, (runs, windows))
    assert (significance.paired_p_values(differences) < 0.05).mean() <= slack(runs)


@pytest.mark.parametrize(("windows", "documented"), [(8, 0.066), (16, 0.061), (64, 0.053)])
def test_skewed_differences_cost_what_the_docstring_says(windows: int, documented: float) -> None:
    differences = np.random.default_rng(windows).gamma(4, 1, (40_000, windows)) - 4
    assert (significance.paired_p_values(differences) < 0.05).mean() == pytest.approx(documented, abs=0.004)


def test_a_small_loss_on_few_windows_survives_the_correction_for_a_thousand_pairs() -> None:
    rng = np.random.default_rng(1)
    text = rng.normal(3, 0.5, (500, 8))
    differences = text + rng.normal(0.3, 0.05, text.shape) - text
    assert (1000 * significance.paired_p_values(differences) < 0.05).mean() > 0.99


def test_flips_count_answers_that_changed() -> None:
    assert significance.flips([1, 0, 0, 1, 0], [1, 1, 1, 0, 0]) == significance.Flips(right_to_wrong=2, wrong_to_right=1)
    assert significance.flips([1, 0], [1, 0]) == (0, 0)
    with pytest.raises(ValueError, match="1 against 2"):
        significance.flips([1], [1, 0])


@pytest.mark.parametrize("counts", [(0, 0), (3, 0), (2, 2), (9, 1), (30, 12)])
def test_mcnemar_is_the_exact_test(counts: tuple[int, int]) -> None:
    lost, won = counts
    assert significance.mcnemar(lost, won) == pytest.approx(reference_mcnemar([[5, lost], [won, 5]], exact=True).pvalue)


@pytest.mark.parametrize(("items", "redrawn"), [(32, 0.1), (200, 0.1), (640, 0.4)])
def test_flips_of_a_against_a_go_both_ways_and_mcnemar_sees_nothing(items: int, redrawn: float) -> None:
    rng, runs = np.random.default_rng(items), 1500
    theirs = rng.random((runs, items)) < 0.5
    ours = np.where(rng.random((runs, items)) < redrawn, rng.random((runs, items)) < 0.5, theirs)
    flips = np.array([significance.flips(a, b) for a, b in zip(ours.astype(float), theirs.astype(float), strict=True)])
    balance = flips[:, 0] - flips[:, 1]
    assert abs(balance.mean()) < 3 * balance.std() / math.sqrt(runs)
    assert flips.sum(axis=1).mean() == pytest.approx(items * redrawn / 2, rel=0.05)
    assert (significance.mcnemar(flips[:, 0], flips[:, 1]) < 0.05).mean() <= 0.05


def test_mcnemar_finds_a_loss_of_ten_points() -> None:
    flips = np.random.default_rng(0).multinomial(200, [0.15, 0.05, 0.8], 2000)
    assert (significance.mcnemar(flips[:, 0], flips[:, 1]) < 0.05).mean() > 0.8


def test_holm_agrees_with_statsmodels_and_leaves_out_what_is_unknown() -> None:
    p_values = np.random.default_rng(2).random(40) ** 3
    assert significance.holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])
    adjusted = significance.holm([0.01, math.nan, 0.04])
    assert adjusted[[0, 2]] == pytest.approx([0.02, 0.04]) and math.isnan(adjusted[1])
    assert significance.holm([]).size == 0


def test_family_wise_error_of_ten_true_nulls() -> None:
    rng, families = np.random.default_rng(4), 5000
    shared = rng.normal(0, 0.5, (families, 1, 16))
    p_values = significance.paired_p_values(shared + rng.normal(0, 1, (families, 10, 16)) - shared)
    wrong = np.array([significance.holm(family).min() < 0.05 for family in p_values]).mean()
    assert 0.03 < wrong <= slack(families)
    assert (p_values.min(axis=1) < 0.05).mean() > 0.3, "without correction most families would err"


def test_standard_errors_are_the_spread_of_the_mean_difference() -> None:
    rng, windows, runs = np.random.default_rng(5), 24, 1500
    text = rng.normal(3, 0.5, (runs, windows))
    ours, theirs = text + 0.2 + rng.normal(0, 0.05, text.shape), text
    found = np.array([significance.standard_errors(a, b) for a, b in zip(ours, theirs, strict=True)])
    apart = ours.mean(axis=1) - rng.permutation(theirs.mean(axis=1))
    assert np.sqrt((found**2).mean(axis=0)) == pytest.approx([apart.std(), (ours - theirs).mean(axis=1).std()], rel=0.05)
    assert significance.standard_errors(ours[0], theirs[0]).gain == pytest.approx(0.5 * math.sqrt(2) / 0.05, rel=0.4)
    assert significance.standard_errors([1.0, 2.0], [0.0, 1.0]).gain == math.inf


def test_ranks_of_equal_rows_are_all_one_in_95_percent_of_tables() -> None:
    rng, tables = np.random.default_rng(6), 600
    for draw in (
        lambda: windows_ranks(rng.normal(3, 0.5, 16) + rng.gamma(2, 0.05, (6, 16))),
        lambda: items_ranks(
            [[task] for task in np.where(rng.random((6, 100)) < 0.2, rng.random((6, 100)) < 0.5, rng.random(100) < 0.5) * 1.0]
        ),
    ):
        assert np.mean([any(places != (1, 6) for places in draw()) for _ in range(tables)]) <= slack(tables)


def test_rows_that_do_not_differ_share_a_rank_and_the_next_one_counts_all_that_are_better() -> None:
    rng = np.random.default_rng(7)
    text = rng.normal(3, 0.5, 32)
    losses = [0.0, 0.3, 0.3, 0.3, 0.9]
    nll = np.array([text + loss + rng.normal(0, 0.02, 32) for loss in losses])
    assert windows_ranks(nll) == [(1, 1), (2, 4), (2, 4), (2, 4), (5, 5)]
    assert windows_ranks(nll[::-1]) == [(5, 5), (2, 4), (2, 4), (2, 4), (1, 1)]
    assert windows_ranks(nll[:1]) == [(1, 1)]
    right = (rng.random(400) < np.array([[0.9], [0.6], [0.6], [0.3]])).astype(float)
    assert items_ranks([[row[:100], row[100:]] for row in right]) == [(1, 1), (2, 3), (2, 3), (4, 4)]


def test_accuracy_is_ranked_by_the_mean_over_tasks_not_by_the_larger_task() -> None:
    rng = np.random.default_rng(11)
    reference = [np.ones(4000)] + [np.repeat([1.0, 0.0], 30)] * 3
    other = [np.where(rng.random(4000) < 0.05, 0.0, 1.0)] + [np.concatenate([np.ones(30), rng.random(30) < 0.4]) for _ in range(3)]
    lost, won = (sum(counts) for counts in zip(*map(significance.flips, other, reference), strict=True))
    assert significance.mcnemar(lost, won) < 0.001 and lost > won, "by items the other is worse"
    assert np.mean([task.mean() for task in other]) > np.mean([task.mean() for task in reference]) + 0.1
    assert significance.accuracy_p_value(other, reference) < 0.001
    assert items_ranks([reference, other]) == [(2, 2), (1, 1)]


def test_false_positives_of_the_accuracy_test() -> None:
    rng, runs = np.random.default_rng(12), 4000
    for sizes, redrawn in (((32,) * 5, 0.2), ((2000, 60, 60, 60), 0.1), ((64,) * 10, 0.02)):
        items = np.array(sizes, dtype=np.float64)
        lost, won = (rng.binomial(sizes, redrawn / 4, (runs, len(sizes))) for _ in range(2))
        assert (significance.accuracy_p_values(won - lost, won + lost, items) < 0.05).mean() <= slack(runs)


def test_the_accuracy_test_agrees_with_its_interval() -> None:
    rng = np.random.default_rng(13)
    seen = set()
    for _ in range(200):
        theirs = [rng.random(n) < 0.5 for n in (40, 80)]
        ours = [np.where(rng.random(len(task)) < 0.15, rng.random(len(task)) < 0.3, task) * 1.0 for task in theirs]
        _, low, high = stats.accuracy_delta_interval(ours, [task * 1.0 for task in theirs])
        seen.add(significant := significance.accuracy_p_value(ours, [task * 1.0 for task in theirs]) < 0.05)
        assert significant is not (low <= 0 <= high)
    assert seen == {True, False}


def test_ranks_agree_with_one_test_for_each_pair() -> None:
    rng = np.random.default_rng(8)
    nll = rng.normal(3, 0.5, 16) + np.linspace(0, 0.4, 12)[:, None] + rng.normal(0, 0.1, (12, 16))
    pairs = [(i, j) for i in range(12) for j in range(i + 1, 12)]
    rejected = multipletests([scipy_stats.ttest_rel(nll[i], nll[j]).pvalue for i, j in pairs], method="holm")[0]
    orders = [sorted(pair, key=lambda k: nll[k].mean()) for r, pair in zip(rejected, pairs, strict=True) if r]
    better, worse = ([sum(order[place] == i for order in orders) for i in range(12)] for place in (1, 0))
    level = [pair for r, pair in zip(rejected, pairs, strict=True) if not r]
    last = [max([12 - worse[i], *(1 + better[j] for pair in level if i in pair for j in pair)]) for i in range(12)]
    assert windows_ranks(nll) == [(1 + count, end) for count, end in zip(better, last, strict=True)]
    assert len(set(better)) > 2 and len(set(worse)) > 2


def test_rows_that_are_not_told_apart_share_a_place_even_where_tests_are_not_transitive() -> None:
    """A before B and B before C for certain, but not A before C, and the same for many between them."""
    merit = -np.arange(6.0)
    p_values = np.array([0.9 if (i, j) == (0, 5) else 1e-9 for i in range(6) for j in range(i + 1, 6)])
    found = places(p_values, merit)
    assert found == [(1, 5), (2, 2), (3, 3), (4, 4), (5, 5), (5, 6)]
    assert found[0].last >= found[5].first, "else the table would put A before C"


@pytest.mark.parametrize("seed", range(5))
def test_ranges_hold_the_true_ranks_at_once_in_95_percent_of_tables(seed: int) -> None:
    rng, tables = np.random.default_rng(100 + seed), 200
    truth = np.sort(rng.uniform(0, 0.4, 8))
    misses = 0
    for _ in range(tables):
        nll = rng.normal(3, 0.5, 16) + truth[:, None] + rng.normal(0, rng.uniform(0.02, 0.3, (8, 1)), (8, 16))
        misses += any(not first <= rank <= last for rank, (first, last) in enumerate(windows_ranks(nll), start=1))
    assert misses / tables <= slack(tables)


def test_five_hundred_rows_are_ranked_in_well_under_two_seconds() -> None:
    import time

    nll = np.random.default_rng(9).normal(3, 0.5, (500, 64)) + np.linspace(0, 3, 500)[:, None]
    began = time.process_time()
    ranks = windows_ranks(nll), items_ranks([[row[:20], row[20:]] for row in (nll > 3.5).astype(float)])
    assert time.process_time() - began < 2
    assert ranks[0][0].first == 1 and max(first for first, _ in ranks[0]) > 400


def test_ranks_on_the_board() -> None:
    made = {row.pipeline: row for row in rows(board())}
    assert made["dense"].rank == 1 <= made["dense"].rank_last < made["awq"].rank  # type: ignore[operator]
    assert 1 < made["awq"].rank < made["rtn"].rank < made["wanda"].rank  # type: ignore[operator]
    assert made["wanda"].status == Status.TIMEOUT, "its quality was measured"
    assert all(made[name].rank is None for name in ("hqq(bits=2)", "quip", "flap(sparsity=0.3)"))
    assert made["dense"].accuracy_rank == 1 < made["wanda"].accuracy_rank  # type: ignore[operator]


def test_a_row_on_other_windows_has_no_rank() -> None:
    made = [record for spec in (Spec(), Spec("a", "pruning", loss=1.2), Spec("b", "pruning", loss=1.5)) for record in records(spec)]
    made[-2].quality.perplexity[0].corpus_sha256 = "other"  # type: ignore[union-attr]
    for record in made:
        record.config["suite"] = {"name": "wiki"}
    assert {row.pipeline: (row.rank, row.rank_last) for row in rows(made)} == {"dense": (1, 1), "a": (2, 2), "b": (None, None)}


def test_ranks_do_not_cross_tables() -> None:
    made = [
        r for seqlen in (512, 2048) for spec in (Spec(seqlen=seqlen), Spec("a", "pruning", loss=1.3, seqlen=seqlen)) for r in records(spec)
    ]
    assert sorted((row.pipeline, row.rank) for row in rows(made)) == [("a", 2), ("a", 2), ("dense", 1), ("dense", 1)]
