"""Verdicts, what would resolve an open one, and recovery: known values, then error, power and coverage by simulation.

An error is held from both sides, so that a test which is too strict (both tails, standard errors without pairing) is noticed as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import optimize
from scipy import stats as scipy_stats
from statsmodels.stats.weightstats import ttost_paired

from slimbench.harness.stats.equivalence import (
    ACCURACY_MARGIN,
    PERPLEXITY_MARGIN,
    POWER,
    Verdict,
    detectable,
    items_to_decide,
    items_to_resolve,
    judge,
    p_values,
)
from slimbench.harness.stats.losses import AnswerLoss, MeanLoss, _likeliest
from slimbench.harness.stats.recovery import Recovery
from slimbench.harness.stats.significance import LEVEL, paired_p_values

Draw = Callable[[np.random.Generator, tuple[int, ...]], NDArray[np.float64]]
Changes = tuple[float, float, float]
"""True shares of the items: lost, won, right in both."""
NOISE: dict[str, Draw] = {  # mean 0, standard deviation 1
    "normal": lambda rng, shape: rng.normal(0, 1, shape),
    "heavy": lambda rng, shape: rng.standard_t(5, shape) / math.sqrt(5 / 3),
}
EQUIVALENT, WORSE, BETTER = range(3)
RUNS = 20_000


def slack(share: float, runs: int) -> float:
    """Three standard errors of a simulated share."""
    return 3 * math.sqrt(share * (1 - share) / runs)


def claimed(p: NDArray[np.float64], *claims: int) -> float:
    """How often a row that is looked at alone makes one of the claims."""
    return float(((p.min(axis=-1) <= LEVEL) & np.isin(p.argmin(axis=-1), claims)).mean())


def verdicts(claims: list[NDArray[np.float64]] | NDArray[np.float64]) -> list[Verdict]:
    return [verdict for verdict, _ in judge(claims)]


def answers(rng: np.random.Generator, sizes: tuple[int, ...], changes: Changes, runs: int, share: float = 1.0) -> AnswerLoss:
    """The answers of two models whose true shares are the same in each task."""
    drawn = np.stack([rng.multinomial(size, [*changes, 1 - sum(changes)], runs) for size in sizes], axis=1).astype(float)
    return AnswerLoss(drawn[..., 0], drawn[..., 1], drawn[..., 2], np.array(sizes, dtype=float), share)


def test_of_symmetric_differences_it_is_schuirmanns_test() -> None:
    rng = np.random.default_rng(0)
    text, half = rng.normal(3, 0.5, 16), rng.normal(0, 0.01, 8)
    ours = text + 0.002 + np.concatenate([half, -half])
    p, low, high = ttost_paired(ours, text, -PERPLEXITY_MARGIN, PERPLEXITY_MARGIN)
    found = p_values(MeanLoss.of(ours, text), PERPLEXITY_MARGIN)
    sides = MeanLoss.of(ours, text).sides(PERPLEXITY_MARGIN)
    assert sides.below == pytest.approx(high[1], rel=0.01) and sides.above == pytest.approx(1 - high[1], rel=0.01)
    assert found[EQUIVALENT] == pytest.approx(p, rel=0.01) and p == max(low[1], high[1])
    unpaired = scipy_stats.ttest_ind(ours, text + PERPLEXITY_MARGIN, alternative="less").pvalue
    assert unpaired > 0.4, "without pairing nothing is shown"


def test_skewness_moves_a_p_value_to_the_safe_side_only() -> None:
    differences = np.random.default_rng(1).gamma(1, 1, (200, 16)) - 1
    sides = MeanLoss(differences).sides(0.0)
    for p, alternative, changed in ((sides.below, "less", 0.9), (sides.above, "greater", 0.0)):
        student = scipy_stats.ttest_1samp(differences, 0.0, axis=1, alternative=alternative).pvalue
        assert (p >= student - 1e-12).all() and (p > student + 1e-6).mean() >= changed


@pytest.mark.parametrize("counts", [(4, 9, 87), (0, 9, 91), (0, 0, 50), (30, 2, 68), (5, 5, 90)])
@pytest.mark.parametrize("deficit", [-0.3, -0.03, 0.0, 0.03, 0.3])
def test_the_likeliest_changes_under_a_bound_maximise_the_likelihood(counts: tuple[int, int, int], deficit: float) -> None:
    won, lost, total = *counts[:2], sum(counts)
    found_lost, found_won = _likeliest(lost / total, won / total, deficit)
    assert found_lost - found_won == pytest.approx(deficit)

    def unlikely(fewer: float) -> float:
        shares = (fewer + max(0.0, -deficit), fewer + max(0.0, deficit))
        return -sum(n * math.log(max(p, 1e-300)) for n, p in zip(counts, (*shares, 1 - sum(shares)), strict=True))

    best = optimize.minimize_scalar(unlikely, bounds=(0, (1 - abs(deficit)) / 2), method="bounded", options={"xatol": 1e-12}).x
    assert min(found_lost, found_won) == pytest.approx(best, abs=1e-4)


def test_an_answer_loss_is_the_mean_of_the_tasks_not_of_the_items() -> None:
    reference = [np.ones(4000), *[np.repeat([1.0, 0.0], 300)] * 3]
    ours = [np.repeat([0.0, 1.0], [240, 3760]), *[np.repeat([1.0, 0.0], [312, 288])] * 3]
    loss = AnswerLoss.of(ours, reference)
    assert float(loss.value) == pytest.approx((0.06 - 3 * 0.02) / 4, abs=1e-3) and loss.count == 5800
    assert float(p_values(loss, ACCURACY_MARGIN)[EQUIVALENT]) < 0.001
    pooled = AnswerLoss.of([np.concatenate(ours)], [np.concatenate(reference)])
    assert float(pooled.value) > ACCURACY_MARGIN, "over all items it would be worse"


def test_partly_right_answers_count_in_part() -> None:
    loss = AnswerLoss.of([[0.5, 1.0, 0.0]], [[1.0, 0.25, 0.0]])
    assert (loss.lost[0], loss.won[0], loss.kept[0]) == (0.5, 0.75, 0.75)


def test_what_cannot_be_tested_is_unresolved_and_no_burden_for_the_others() -> None:
    single = p_values(MeanLoss.of([1.0], [1.0]), PERPLEXITY_MARGIN)
    assert np.isnan(single).all()
    sure = np.array([0.03, 1.0, 1.0])
    assert verdicts([single, sure]) == [Verdict.UNRESOLVED, Verdict.EQUIVALENT]
    assert verdicts([np.array([0.03, 1, 1]), np.array([0.9, 1, 1])]) == [Verdict.UNRESOLVED] * 2, "Holm's correction over two rows"
    assert verdicts([np.array([0.03, 1, 1]), np.array([1, 1e-9, 1]), np.array([1, 1, 1e-9])]) == ["equivalent", "worse", "better"]
    assert verdicts([]) == []
    with pytest.raises(ValueError, match="2 against 3"):
        MeanLoss.of([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="at least one task"):
        AnswerLoss.of([], [])


def test_identical_windows_are_equivalent_and_few_identical_answers_are_not() -> None:
    text = np.random.default_rng(2).normal(3, 0.5, 16)
    assert verdicts([p_values(MeanLoss.of(text, text), PERPLEXITY_MARGIN)]) == [Verdict.EQUIVALENT]
    for items, verdict in ((12, Verdict.UNRESOLVED), (60, Verdict.EQUIVALENT)):
        task = np.resize([1.0, 0.0], items)
        assert verdicts([p_values(AnswerLoss.of([task] * 5, [task] * 5), ACCURACY_MARGIN)]) == [verdict], items


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("windows", [8, 16, 64])
@pytest.mark.parametrize("width", [4.0, 1.0, 0.2], ids=lambda width: f"margin of {width} standard errors")
def test_error_of_verdicts_of_perplexity_at_the_edge_of_the_margin(windows: int, noise: str, width: float) -> None:
    rng = np.random.default_rng(windows)
    spread = PERPLEXITY_MARGIN * math.sqrt(windows) / width
    difference = spread * NOISE[noise](rng, (RUNS, windows))
    most, least = LEVEL + slack(LEVEL, RUNS), 0.035
    for sign, right in ((1, WORSE), (-1, BETTER)):
        p = p_values(MeanLoss(difference + sign * PERPLEXITY_MARGIN), PERPLEXITY_MARGIN)
        outside = claimed(p, EQUIVALENT, *{WORSE, BETTER} - {right})
        inside = claimed(p, WORSE, BETTER)
        assert outside <= most and inside <= most, "a loss of the margin is worse; one that is smaller by nothing is equivalent"
        assert width < 4 or (outside >= least and inside >= least), "no stricter than it says"
    assert claimed(p_values(MeanLoss(difference), PERPLEXITY_MARGIN), WORSE, BETTER) <= most


@pytest.mark.parametrize(
    ("windows", "skewness", "documented", "student"), [(16, 1, 0.057, 0.077), (16, 2, 0.068, 0.115), (64, 1, 0.053, 0.065)]
)
def test_skewed_differences_cost_what_the_docstring_says(windows: int, skewness: int, documented: float, student: float) -> None:
    shape = 4 / skewness**2
    differences = 1e-4 * (np.random.default_rng(windows).gamma(shape, 1, (40_000, windows)) - shape) + PERPLEXITY_MARGIN
    p = p_values(MeanLoss(differences), PERPLEXITY_MARGIN)
    assert claimed(p, EQUIVALENT) == pytest.approx(documented, abs=0.004)
    alone = scipy_stats.ttest_1samp(differences, PERPLEXITY_MARGIN, axis=1, alternative="less").pvalue
    assert (alone <= LEVEL).mean() == pytest.approx(student, abs=0.004)
    assert claimed(p, WORSE) <= LEVEL


SIZES = [(1160,), (145,) * 8, (32,) * 5, (64,) * 10, (2000, 60, 60, 60)]
EDGE: list[Changes] = [(0.03, 0.0, 0.5), (0.035, 0.005, 0.5), (0.05, 0.02, 0.5), (0.07, 0.04, 0.5), (0.13, 0.10, 0.5)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("changes", EDGE, ids=str)
def test_error_of_verdicts_of_accuracy_at_the_edge_of_the_margin(sizes: tuple[int, ...], changes: Changes) -> None:
    rng = np.random.default_rng(len(sizes))
    lost, won, kept = changes
    most = LEVEL + slack(LEVEL, RUNS)
    worse = p_values(answers(rng, sizes, changes, RUNS), ACCURACY_MARGIN)
    better = p_values(answers(rng, sizes, (won, lost, kept), RUNS), ACCURACY_MARGIN)
    assert claimed(worse, EQUIVALENT, BETTER) <= most and claimed(better, EQUIVALENT, WORSE) <= most
    assert claimed(worse, WORSE, BETTER) <= most + 0.002 and claimed(better, WORSE, BETTER) <= most + 0.002
    if sizes in SIZES[:2]:
        assert claimed(worse, EQUIVALENT) >= 0.04 and claimed(worse, WORSE) >= 0.04, "no stricter than it says"


@pytest.mark.parametrize("rows", [2, 10, 24])
@pytest.mark.parametrize("others", [1.0, 8.0])
def test_at_most_one_table_in_twenty_has_a_false_verdict(rows: int, others: float) -> None:
    """Rows share text and reference; half lie on the margin, the others too or far outside: the worst for a correction in steps."""
    rng, tables, windows = np.random.default_rng(rows), 3000, 24
    true = PERPLEXITY_MARGIN * np.where(np.arange(rows) % 2, others, 1.0)
    reference = rng.normal(0, 0.01, (tables, 1, windows))
    ours = true[:, None] + rng.normal(0, 0.01, (tables, rows, windows)) - reference
    p = p_values(MeanLoss(ours), PERPLEXITY_MARGIN)
    found = [verdicts(table) for table in p]
    false = np.mean([any(verdict in ("equivalent", "better") for verdict in table) for table in found])
    assert false <= LEVEL + slack(LEVEL, tables)
    assert others == 1 or np.mean([[verdict == "worse" for verdict in table[1::2]] for table in found]) > 0.99
    alone = ((p[:, ::2, EQUIVALENT] <= LEVEL).any(axis=1)).mean()
    assert rows == 2 or alone > 0.12, "without correction more tables would err"


@pytest.mark.parametrize("level", [LEVEL, LEVEL / 12])
@pytest.mark.parametrize(
    ("loss", "spread"),
    [(0.0, 2.0), (0.5, 2.0), (-0.7, 1.0), (1.5, 1.0), (2.0, 4.0), (20.0, 40.0), (-3.0, 5.0)],
    ids=lambda number: f"{number} margins",
)
def test_as_many_windows_as_are_promised_resolve_four_rows_in_five(loss: float, spread: float, level: float) -> None:
    rng, runs = np.random.default_rng(3), 8000
    half = rng.normal(0, 1, 100)
    pilot = np.concatenate([half, -half])
    pilot = PERPLEXITY_MARGIN * (loss + spread * pilot / pilot.std(ddof=1))
    count = items_to_resolve(MeanLoss(pilot), PERPLEXITY_MARGIN, level)
    assert count is not None
    claim = EQUIVALENT if abs(loss) < 1 else WORSE if loss > 0 else BETTER

    def resolved(windows: int) -> float:
        drawn = PERPLEXITY_MARGIN * (loss + spread * rng.normal(0, 1, (runs, windows)))
        p = p_values(MeanLoss(drawn), PERPLEXITY_MARGIN)
        return float(((p[:, claim] <= level) & (p.argmin(axis=1) == claim)).mean())

    assert POWER - slack(POWER, runs) - 0.01 <= resolved(count) <= POWER + slack(POWER, runs) + 1 / math.sqrt(count)
    assert resolved(max(2, int(0.8 * count))) < POWER - 0.03 or count < 8


@pytest.mark.parametrize("level", [LEVEL, LEVEL / 12])
@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ((0.05, 0.05, 0.4), (100,) * 8),
        ((0.065, 0.045, 0.4), (100,) * 8),
        ((0.01, 0.005, 0.5), (400, 100)),
        ((0.10, 0.03, 0.4), (100,) * 5),
        ((0.15, 0.10, 0.4), (300,)),
    ],
    ids=str,
)
def test_as_many_items_as_are_promised_resolve_four_rows_in_five(changes: Changes, sizes: tuple[int, ...], level: float) -> None:
    rng, runs = np.random.default_rng(4), 8000
    many = [100 * size for size in sizes]
    lost, won, kept = (np.array([share * size for size in many]) for share in changes)
    pilot = AnswerLoss(lost, won, kept, np.array(many, dtype=float))
    count = items_to_resolve(pilot, ACCURACY_MARGIN, level)
    assert count is not None
    claim = EQUIVALENT if changes[0] - changes[1] < ACCURACY_MARGIN else WORSE

    def resolved(items: float) -> float:
        parts = tuple(round(items * size / sum(sizes)) for size in sizes)
        p = p_values(answers(rng, parts, changes, runs), ACCURACY_MARGIN)
        return float(((p[:, claim] <= level) & (p.argmin(axis=1) == claim)).mean())

    assert POWER - slack(POWER, runs) - 0.03 <= resolved(count) <= POWER + slack(POWER, runs) + 0.03
    assert resolved(0.8 * count) < POWER - 0.03


def test_a_loss_on_the_margin_needs_more_than_anybody_measures() -> None:
    swing = np.resize([0.05, -0.05], 16)
    assert items_to_resolve(MeanLoss(swing + PERPLEXITY_MARGIN), PERPLEXITY_MARGIN) is None
    assert items_to_decide(MeanLoss(swing + PERPLEXITY_MARGIN), PERPLEXITY_MARGIN) is None
    assert items_to_resolve(MeanLoss(np.zeros(16)), PERPLEXITY_MARGIN) == 2
    assert items_to_resolve(MeanLoss(np.full(16, 0.02)), PERPLEXITY_MARGIN) == 2


@pytest.mark.parametrize("windows", [8, 16, 64])
def test_the_detectable_difference_is_found_four_times_in_five(windows: int) -> None:
    rng, runs = np.random.default_rng(windows), 20_000
    difference = detectable(1 / math.sqrt(windows), windows)
    found = (paired_p_values(difference + rng.normal(0, 1, (runs, windows))) < LEVEL).mean()
    assert found == pytest.approx(POWER, abs=0.015)
    assert detectable(0.01, math.inf) == pytest.approx(0.01 * (1.959964 + 0.841621)) and math.isnan(detectable(0.01, 1))


def test_a_drop_of_three_points_needs_some_eleven_hundred_items_where_eleven_percent_of_answers_change() -> None:
    assert detectable(math.sqrt(0.11 / 1160), math.inf) == pytest.approx(0.0273, abs=1e-3)


@pytest.mark.parametrize("sizes", [(32,) * 5, (145,) * 8], ids=str)
@pytest.mark.parametrize(("right", "ratio", "won"), [(0.5, 0.95, 0.02), (0.9, 0.95, 0.0), (0.5, 0.8, 0.08), (0.3, 1.0, 0.05)])
def test_each_bound_of_a_recovery_of_accuracy_holds_in_95_percent(sizes: tuple[int, ...], right: float, ratio: float, won: float) -> None:
    """A share is within a bound exactly where the test of that share does not reject, so one test of the true share is enough."""
    lost = won + (1 - ratio) * right
    loss = answers(np.random.default_rng(len(sizes)), sizes, (lost, won, right - lost), RUNS, ratio)
    sides = loss.sides(0.0)
    for p in (sides.below, sides.above):
        assert (p <= LEVEL).mean() <= LEVEL + slack(LEVEL, RUNS) + 0.001
        assert sizes == (32,) * 5 or (p <= LEVEL).mean() >= 0.04
    one = Recovery.of_accuracy(*_spelled(loss, 0))
    low, high = one.bounds(0.95)
    assert low < one.value < high and one.above(low) == pytest.approx(LEVEL, abs=1e-6) and one.below(high) == pytest.approx(LEVEL, abs=1e-6)
    assert one.above(ratio) == pytest.approx(float(sides.below[0])) and one.below(ratio) == pytest.approx(float(sides.above[0]))


def _spelled(loss: AnswerLoss, run: int) -> tuple[list[list[float]], list[list[float]]]:
    """Answers one by one from their numbers."""
    ours, theirs = [], []
    for lost, won, kept, items in zip(loss.lost[run], loss.won[run], loss.kept[run], loss.items, strict=True):
        pairs = [(0.0, 1.0)] * int(lost) + [(1.0, 0.0)] * int(won) + [(1.0, 1.0)] * int(kept)
        pairs += [(0.0, 0.0)] * int(items - len(pairs))
        ours.append([a for a, _ in pairs])
        theirs.append([b for _, b in pairs])
    return ours, theirs


def test_bounds_of_a_recovery_of_perplexity_are_those_of_one_sided_tests() -> None:
    rng = np.random.default_rng(6)
    text, half = rng.normal(3, 0.5, 16), rng.normal(0, 0.02, 8)
    recovery = Recovery.of_perplexity(text + 0.03 + np.concatenate([half, -half]), text)
    error = np.concatenate([half, -half]).std(ddof=1) / 4
    reach = scipy_stats.t.ppf(0.95, 15) * error
    assert recovery.value == pytest.approx(math.exp(-0.03))
    assert recovery.bounds(0.95) == pytest.approx((math.exp(-0.03 - reach), math.exp(-0.03 + reach)), rel=1e-3)
    assert all(map(math.isnan, Recovery.of_perplexity([1.0], [1.0]).bounds(0.95)))


def test_a_recovery_without_limits_says_so() -> None:
    nothing = Recovery.of_accuracy([np.zeros(40)], [np.ones(40)])
    assert nothing.value == 0 and nothing.bounds(0.95)[0] == 0 and nothing.bounds(0.95)[1] < 0.2
    assert Recovery.of_accuracy([np.ones(40)], [np.resize([1.0] + [0.0] * 39, 40)]).bounds(0.95)[1] == math.inf
    with pytest.raises(ValueError, match="nothing right"):
        Recovery.of_accuracy([np.ones(40)], [np.zeros(40)])


@pytest.mark.parametrize(("true", "asked"), [(0.97, 0.95), (0.93, 0.95), (1.0, 0.99)])
def test_as_many_items_as_are_promised_decide_a_gate_four_times_in_five(true: float, asked: float) -> None:
    rng, runs, right, won = np.random.default_rng(7), 8000, 0.5, 0.04
    lost = won + (1 - true) * right
    counts = [100_000 * np.array([share]) for share in (lost, won, right - lost, 1.0)]
    count = items_to_decide(AnswerLoss(*counts, share=asked), 0.0)
    assert count is not None
    sides = answers(rng, (count,), (lost, won, right - lost), runs, asked).sides(0.0)
    shown = ((sides.below if true > asked else sides.above) <= LEVEL).mean()
    assert abs(shown - POWER) <= slack(POWER, runs) + 0.01
