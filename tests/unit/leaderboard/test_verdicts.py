"""Verdicts of rows, each against its own reference within its table; what would resolve them, and what a table says that it can resolve."""

from __future__ import annotations

import io
import itertools
import math
import re
from dataclasses import replace
from statistics import median

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from slimbench.harness.schema.record import Record
from slimbench.harness.stats.equivalence import ACCURACY_MARGIN, PERPLEXITY_MARGIN, POWER, judge, p_values
from slimbench.harness.stats.losses import AnswerLoss, MeanLoss
from slimbench.harness.stats.significance import LEVEL, holm
from slimbench.leaderboard.figures.plots import Gallery
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.site import names
from slimbench.leaderboard.site.board import Board
from slimbench.leaderboard.tables.columns import COLUMNS, VerdictColumn
from slimbench.leaderboard.tables.format import decimal
from slimbench.leaderboard.tables.latex import escape, to_latex
from slimbench.leaderboard.tables.resolution import resolution
from slimbench.leaderboard.tables.tables import tables
from slimbench.leaderboard.tables.writers import to_markdown, to_terminal
from tests.support.board_records import Spec, board, records, site_files
from tests.support.paths import ROOT
from tests.unit.leaderboard.test_gate import repeated

DENSE = Spec()
SAME = Spec("same", "quantization", loss=1.0, accuracy=0.53)
NEAR = Spec("near", "quantization", loss=1.006, accuracy=0.525)
FAR = Spec("far", "quantization", loss=1.3, accuracy=0.4)


def cells(*specs: Spec) -> list[Record]:
    return [record for spec in specs for record in records(spec)]


def by_name(made: list[Record]) -> dict[str, Row]:
    return {row.pipeline: row for row in rows(made)}


def losses(made: list[Record]) -> dict[str, tuple[MeanLoss, AnswerLoss]]:
    """The losses of each compressed pipeline, paired by hand."""
    quality = {record.cell.pipeline: record.quality for record in made if record.quality and record.status == "ok"}
    dense, found = quality.pop("dense"), {}
    assert dense
    for name, ours in quality.items():
        assert ours
        texts = MeanLoss(np.subtract(ours.perplexity[0].window_nll, dense.perplexity[0].window_nll))
        tasks = [[task.items.correct for task in result.zeroshot] for result in (ours, dense)]
        found[name] = texts, AnswerLoss.of(*tasks)
    return found


def test_each_row_is_judged_against_its_reference_with_holm_over_the_rows_of_its_table() -> None:
    made = board()
    found, known = by_name(made), losses(made)
    assert len(known) > 10
    for place, (measure, margin) in enumerate((("perplexity", PERPLEXITY_MARGIN), ("accuracy", ACCURACY_MARGIN))):
        expected = judge([p_values(loss[place], margin) for loss in known.values()])
        for name, (verdict, p) in zip(known, expected, strict=True):
            row = found[name]
            assert getattr(row, f"{measure}_verdict") == verdict, (name, measure)
            assert getattr(row, f"{measure}_verdict_p") == pytest.approx(p)
        seen = {verdict for verdict, _ in expected}
        assert {"worse", "unresolved"} <= seen
    unjudged = [row for name, row in found.items() if name not in known]
    assert {row.pipeline for row in unjudged} >= {"dense", "hqq(bits=2)", "quip"}
    assert all(row.perplexity_verdict is row.accuracy_verdict is row.perplexity_detectable_percent is None for row in unjudged)


def test_a_row_that_loses_much_is_worse_and_one_that_gains_much_is_better() -> None:
    made = cells(DENSE, FAR, SAME)
    text = made[7].quality.perplexity[0]  # type: ignore[union-attr]
    text.window_nll = [nll - 0.1 for nll in text.window_nll]
    found = by_name(made)
    assert (found["far"].perplexity_verdict, found["same"].perplexity_verdict) == ("worse", "better")
    assert found["far"].accuracy_verdict == "worse"


def test_more_rows_make_a_verdict_harder_and_rows_of_another_table_do_not() -> None:
    alone = by_name(cells(DENSE, NEAR))["near"]
    assert alone.perplexity_verdict_p is not None
    crowd = [replace(NEAR, pipeline=f"near-{number}") for number in range(6)]
    beside = by_name(cells(DENSE, NEAR, *crowd))["near"]
    assert beside.perplexity_verdict_p is not None and beside.perplexity_verdict_p > 1.5 * alone.perplexity_verdict_p
    elsewhere = [replace(spec, suite="papers") for spec in (DENSE, *crowd)]
    (same,) = (row for row in rows(cells(DENSE, NEAR, *elsewhere)) if row.pipeline == "near")
    assert same.perplexity_verdict_p == pytest.approx(alone.perplexity_verdict_p)


def test_a_copy_is_equivalent_in_text_and_a_few_identical_answers_are_not() -> None:
    made = cells(DENSE, SAME)
    ours, theirs = made[4].quality, made[1].quality
    assert ours and theirs
    ours.perplexity[0].window_nll = list(theirs.perplexity[0].window_nll)
    for task, other in zip(ours.zeroshot, theirs.zeroshot, strict=True):
        task.items.correct = list(other.items.correct)
    assert by_name(made)["same"].perplexity_verdict == by_name(made)["same"].accuracy_verdict == "equivalent"
    for result in (ours, theirs):
        for task in result.zeroshot:
            task.items = task.items.model_copy(update={name: getattr(task.items, name)[:20] for name in ("ids", "hashes", "correct")})
    row = by_name([Record.model_validate(record.model_dump()) for record in made])["same"]
    assert (row.accuracy_verdict, row.accuracy_items, row.flips_to_wrong, row.flips_to_right) == ("unresolved", 60, 0, 0)


@pytest.mark.parametrize("measure", ["perplexity", "accuracy"])
def test_what_is_said_to_resolve_a_row_resolves_it(measure: str) -> None:
    made = cells(DENSE, replace(NEAR, accuracy=0.49))
    row = by_name(made)["near"]
    needed, count = getattr(row, f"{measure}_needed"), {"perplexity": row.perplexity_windows, "accuracy": row.accuracy_items}[measure]
    assert getattr(row, f"{measure}_verdict") == "unresolved" and needed and count and needed > count
    resolved = by_name(repeated(made, math.ceil(needed / count)))["near"]
    assert getattr(resolved, f"{measure}_verdict") in ("equivalent", "worse") and getattr(resolved, f"{measure}_needed") is None


def test_the_detectable_difference_is_that_of_the_rows_own_paired_error() -> None:
    made = board()
    for name, (text, answers) in losses(made).items():
        row = by_name(made)[name]
        error = stats.sem(text.differences)
        nats = error * (stats.t.ppf(1 - LEVEL / 2, 47) + stats.t.ppf(POWER, 47))
        assert row.perplexity_detectable_percent == pytest.approx(100 * (math.exp(nats) - 1))
        assert row.accuracy_delta_high is not None and row.accuracy_delta_low is not None
        paired = (row.accuracy_delta_high - row.accuracy_delta_low) / 2 / 1.959964
        assert row.accuracy_detectable == pytest.approx(paired * (1.959964 + 0.841621), rel=0.01), name
        assert row.accuracy_detectable == pytest.approx(float(answers.error) * (1.959964 + 0.841621))


def test_adjacent_rows_are_told_apart_by_paired_tests_of_neighbours() -> None:
    made = [*board(), *records(Spec("int8 again", "quantization", loss=1.0075))]
    ranked = sorted((row for row in rows(made) if row.rank is not None), key=lambda row: row.perplexity or 0)
    nll = {record.cell.pipeline: record.quality.perplexity[0].window_nll for record in made if record.quality}
    p = [stats.ttest_rel(nll[a.pipeline], nll[b.pipeline]).pvalue for a, b in itertools.pairwise(ranked)]
    expected = (holm(p) < LEVEL).tolist()
    assert [row.perplexity_apart for row in ranked] == [None, *expected] and 0 < sum(expected) < len(expected)
    by_accuracy = sorted((row for row in rows(made) if row.accuracy_rank is not None), key=lambda row: -(row.accuracy or 0))
    assert by_accuracy[0].accuracy_apart is None and all(row.accuracy_apart is not None for row in by_accuracy[1:])
    flags = [row.accuracy_apart for row in by_accuracy]
    assert 0 < sum(map(bool, flags)) < len(flags) - 1


def test_rows_of_another_folder_have_no_verdict_beside_ones_own() -> None:
    made = cells(DENSE, NEAR, FAR)
    alone = by_name(made)
    for record in made[6:]:
        record.foreign = True
    mixed = by_name(made)
    assert mixed["far"].perplexity_verdict is None and mixed["near"].perplexity_verdict == alone["near"].perplexity_verdict
    for record in made:
        record.foreign = True
    assert by_name(made)["far"].perplexity_verdict == "worse", "among themselves they have"


def test_rows_on_other_texts_have_no_verdict() -> None:
    made = cells(DENSE, NEAR)
    made[4].quality.perplexity[0].corpus_sha256 = made[4].quality.zeroshot[0].items.hashes[0] = "other"  # type: ignore[union-attr]
    row = by_name(made)["near"]
    assert row.perplexity_verdict is None and row.accuracy_verdict is None


def lines(found: list[Row]) -> list[str]:
    """What a table must say, from its rows alone."""
    said = []
    for measure, count, margin, key, form in (
        ("perplexity", "48 windows", "1 %", "perplexity_detectable_percent", lambda v: f"{decimal(1)(v)} %"),
        ("accuracy", "600 items", "3 points", "accuracy_detectable", lambda v: f"{decimal(1, 100)(v)} points"),
    ):
        verdicts = [getattr(row, f"{measure}_verdict") for row in found]
        counts = ", ".join(f"{verdicts.count(name)} {name}" for name in ("equivalent", "worse", "unresolved"))
        shown = form(median(value for row in found if (value := getattr(row, key)) is not None))
        apart = [value for row in found if (value := getattr(row, f"{measure}_apart")) is not None]
        said.append(
            f"{measure.capitalize()} on {count}, verdicts at ± {margin}: {counts}; the median row can show a difference of {shown} "
            f"(80 % power); {sum(apart)} of {len(apart)} adjacent rows are told apart."
        )
    return said


def test_every_table_says_margin_difference_and_adjacent_rows() -> None:
    made = board()
    (table,) = tables(rows(made))
    wanted = lines(table.rows)
    assert resolution(table.rows) == wanted
    console = Console(width=400, file=io.StringIO(), record=True)
    console.print(to_terminal(table.rows))
    markdown, terminal, latex = to_markdown(table.rows).replace("\\", ""), console.export_text(), to_latex(table.rows)
    files = site_files(Board.of(made), {}, Gallery())
    ranking, model = (files[name].decode() for name in ("index.html", names.model("tiny-135m")))
    assert all(line in text for line in wanted for text in (markdown, terminal, ranking, model))
    assert all(escape(line, 400) in latex for line in wanted)
    assert all("± is half of the 95 % interval" in text for text in (markdown, terminal)) and "half of the 95" in latex
    assert "Intervals are 95 %" in ranking and "Intervals are 95 %" in model
    assert wanted[0] in Board.of(made).settings[0]["resolution"]


def test_a_table_says_how_far_the_reference_is_from_itself() -> None:
    (table,) = tables(rows(board()))
    distances = sorted(row.kl_low for row in table.rows if row.kl_low is not None)
    assert len(distances) > 2
    floored = [row.model_copy(update={"kl_noise": distances[1]}) for row in table.rows]
    last = resolution(floored)[-1]
    assert last.startswith(f"KL: dense is up to {distances[1]:.2g} nats from itself") and last.endswith(
        "; 2 rows cannot be told from that."
    )


def test_a_table_without_comparisons_claims_nothing() -> None:
    assert resolution(rows(cells(DENSE))) == []
    assert "verdicts at" not in to_markdown(rows(cells(DENSE)))


def test_a_verdict_is_a_column_with_what_would_resolve_it() -> None:
    columns = {column.key: column for column in COLUMNS if isinstance(column, VerdictColumn)}
    assert set(columns) == {"perplexity_verdict", "accuracy_verdict"}
    made = rows(board())
    for key, column in columns.items():
        measure = key.partition("_")[0]
        for row in made:
            verdict, needed = getattr(row, key), getattr(row, f"{measure}_needed")
            assert column.value(row) == (verdict or "–") and (needed is None or verdict == "unresolved")
            assert column.plus_minus(row) == (f"unresolved ({needed:,})" if needed else column.value(row))
            assert column.interval(row) == (f"{needed:,} {column.unit} would tell" if needed else "")
    assert math.exp(PERPLEXITY_MARGIN) == pytest.approx(1.01) and ACCURACY_MARGIN == 0.03, "as headings and descriptions say"


def test_the_spread_of_an_accuracy_is_half_of_its_95_percent_interval_as_of_every_number() -> None:
    (column,) = (column for column in COLUMNS if column.key == "accuracy")
    for row in rows(board()):
        if row.accuracy is not None and row.accuracy_se is not None:
            assert column.plus_minus(row) == f"{100 * row.accuracy:.1f} ± {100 * 1.959964 * row.accuracy_se:.1f}"
            low, high = (100 * (row.accuracy + sign * 1.959964 * row.accuracy_se) for sign in (-1, 1))
            assert column.interval(row) == f"{low:.1f}–{high:.1f}"


CLAIMS = re.compile(r"\blossless|\bno loss\b|\bunchanged\b|\bsame quality|\bas good as|\bloses nothing|\bno difference\b", re.IGNORECASE)
ALLOWED = ('"No difference found" is not "equal"', "loses nothing: the same command goes on", "No difference was found")


def test_no_table_page_or_document_calls_a_difference_none_that_was_not_found() -> None:
    kinds = ("*.py", "*.j2", "*.js")
    files = [path for kind in kinds for path in (ROOT / "leaderboard").rglob(kind)]
    files += [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    found = []
    for path in files:
        text = path.read_text(encoding="utf-8")
        for allowed in ALLOWED:
            text = text.replace(allowed, "")
        found += [f"{path.relative_to(ROOT)}: {claim}" for claim in CLAIMS.findall(text)]
    assert len(files) > 90 and found == ["leaderboard/figures/drawing.py: no difference"], "that one is of colours"


def test_the_records_of_reference_are_mostly_resolved_in_perplexity_and_hardly_in_accuracy(committed_rows: list[Row]) -> None:
    (table,) = (t.rows for t in tables(committed_rows) if t.rows[0].suite == "quick" and len(t.rows) > 50)
    found = {row.label: row for row in table}
    assert [found[name].perplexity_verdict for name in ("rtn-8bit", "kv-int8", "int8-dynamic", "gptq-3bit")] == [
        *("equivalent", "equivalent", "worse", "worse")
    ]
    near = [row for row in table if row.perplexity_delta_percent is not None and abs(row.perplexity_delta_percent) <= 3]
    assert sum(row.perplexity_verdict != "unresolved" for row in near) >= 0.6 * len(near)
    judged = [row for row in table if row.accuracy_verdict]
    assert sum(row.accuracy_verdict == "unresolved" for row in judged) > 0.8 * len(judged), "160 items show little"
    assert 0.06 < median(row.accuracy_detectable or 0 for row in judged) < 0.08


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (3403.0, 11502.0, "6345 [3403–11502]"),
        (6282.0, 6408.0, "6345 ± 63.00"),
        (6245.0, 6464.0, "6345 ± 109.5"),
        (6245.0, 6466.0, "6345 [6245–6466]"),
        (6345.0, 6400.0, "6345 [6345–6400]"),
        (6344.997, 6345.004, "6345 ± 0.00"),
        (None, None, "6345"),
    ],
)
def test_half_of_a_skewed_interval_is_not_what_a_table_shows(low: float | None, high: float | None, shown: str) -> None:
    (column,) = (column for column in COLUMNS if column.key == "perplexity")
    row = rows(cells(DENSE))[0].model_copy(update={"perplexity": 6345.0, "perplexity_low": low, "perplexity_high": high})
    assert column.plus_minus(row) == shown
    latex = to_latex([row])
    assert (r"6345{\scriptsize~[" in latex) is ("[" in shown) and ("[" not in shown or "square brackets" in latex)


@pytest.mark.parametrize(
    ("flag", "left"),
    [
        ("not causal: activations have one scale", {"near"}),
        ("calibration text inside the test text: 11.6% of wikipedia", {"near"}),
        ("other load: 2.0 cores", {"near", "far"}),
    ],
)
def test_a_quality_that_a_flag_takes_away_has_no_verdict_and_no_share_in_what_the_table_resolves(flag: str, left: set[str]) -> None:
    made = cells(DENSE, NEAR, FAR)
    (quality,) = (record.quality for record in made if record.cell.pipeline == "far" and record.quality)
    quality.flags.append(flag)
    found, alone = by_name(made), by_name(cells(DENSE, NEAR))
    assert {name for name, row in found.items() if row.perplexity_verdict} == left
    assert {name for name, row in found.items() if row.accuracy_verdict} == left
    if left == {"near"}:
        assert resolution(list(found.values())) != resolution(list(by_name(cells(DENSE, NEAR, FAR)).values()))
        assert found["near"].perplexity_verdict_p == alone["near"].perplexity_verdict_p, "Holm counts the rows that have one"
