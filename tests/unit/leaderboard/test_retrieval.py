"""What is found in long contexts beside dense: item by item, what dense does not find left out, no score where that is too little."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from slimbench.harness.cli.main import app
from slimbench.harness.schema.record import Record
from slimbench.harness.schema.retrieval import RetrievalResult
from slimbench.harness.stats.shares import clustered_share
from slimbench.harness.store.store import Store
from slimbench.leaderboard.compare import retrieval
from slimbench.leaderboard.figures.canvas import Plot
from slimbench.leaderboard.figures.catalogue import Absent, figures
from slimbench.leaderboard.figures.plots import Gallery
from slimbench.leaderboard.rows.results.retrieval import FEWEST
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.site import names
from slimbench.leaderboard.site.board import Board
from slimbench.leaderboard.site.facts import details
from slimbench.leaderboard.tables.format import EMPTY
from slimbench.leaderboard.tables.writers import to_markdown
from tests.support.board_records import Spec, records, site_files
from tests.unit.cli.test_cli import slimbench
from tests.unit.leaderboard.test_board import printed

CONTEXT = [place // 3 for place in range(18)]
DENSE = [1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1]
OURS = [1, 0, 1, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0]


def result(correct: list[int], length: int = 1024, **changed: Any) -> RetrievalResult:
    fields = {
        "protocol": "retrieval-1",
        "corpus": "bigbench-mysteries",
        "corpus_sha256": "c0",
        "length": length,
        "needles": 3,
        "items_sha256": f"items of {length}",
        "context": CONTEXT,
        "depth": [0.1, 0.5, 0.9] * 6,
        "correct": correct,
        "answers_sha256": "a0",
        "cache_bytes": 1000 * length,
        "step_ms": [30.0, 31.0, 90.0, 29.0, 32.0, 30.5],
    }
    return RetrievalResult.model_validate(fields | changed)


def with_facts(spec: Spec, *results: RetrievalResult) -> list[Record]:
    made = records(spec)
    next(record.quality for record in made if record.quality).retrieval = list(results)
    return made


def board(ours: list[int] = OURS, dense: list[int] = DENSE, **changed: Any) -> list[Record]:
    return [
        *with_facts(Spec(), result(dense), result(dense, 2048)),
        *with_facts(Spec("h2o(budget=256)", "compact"), result(ours, cache_bytes=256_000, **changed)),
    ]


def line(made: list[Record], method: str = "h2o(budget=256)", length: int = 1024) -> dict[str, Any]:
    (found,) = [one for one in retrieval.figures(made) if one["method"] == method and one["length"] == length]
    return found


def test_the_score_is_of_the_items_that_dense_finds() -> None:
    found = line(board())
    assert found["dense_answers"] == 13
    assert found["score"] == 9 / 13, "of 11 right answers two are at items that dense has wrong"
    wanted = clustered_share([1, 2, 3, 1, 2], [2, 3, 3, 2, 3])
    assert (found["score"], found["score_low"], found["score_high"]) == wanted, "clusters are contexts; one has no item that dense finds"
    dense = line(board(), "dense")
    assert dense["score"] == 1.0 and dense["score_low"] is dense["score_high"] is None, "nothing is estimated"


def test_numbers_of_bytes_and_times_stand_beside_those_of_dense() -> None:
    figures = {(one["method"], one["length"]): one for one in retrieval.figures(board())}
    ours = figures["h2o(budget=256)", 1024]
    assert (ours["items"], ours["answered"], ours["dense_answers"], ours["left_out"]) == (18, 11, 13, 5)
    assert (ours["cache_bytes"], ours["dense_cache_bytes"]) == (256_000, 1_024_000)
    assert (ours["step_ms"], ours["dense_step_ms"], ours["reason"]) == (30.75, 30.75, None)
    assert [one["method"] for one in retrieval.figures(board())] == ["h2o(budget=256)", "dense", "dense"], "fewest bytes first"


@pytest.mark.parametrize(("answers", "has_score"), [(FEWEST - 1, False), (FEWEST, True)])
def test_a_length_at_which_dense_finds_too_little_says_so_and_has_no_score(answers: int, has_score: bool) -> None:
    found = line(board(dense=[1] * answers + [0] * (18 - answers)))
    assert (found["score"] is not None) == has_score and found["dense_answers"] == answers
    if not has_score:
        assert found["reason"] == "dense finds 7 of 18 facts, fewer than 8"
        assert found["score"] is found["score_low"] is None and found["cache_bytes"] == 256_000


@pytest.mark.parametrize(
    "changed", [{"items_sha256": "others"}, {"corpus_sha256": "c1"}, {"protocol": "retrieval-2"}, {"context": [0] * 18}, {"length": 1025}]
)
def test_other_items_are_held_against_nothing(changed: dict[str, Any]) -> None:
    found = line(board(**changed), length=changed.get("length", 1024))
    assert found["score"] is None and found["dense_answers"] is None
    assert found["reason"] == "dense was not asked the same on this engine and machine"


def test_dense_of_another_machine_or_engine_is_not_what_a_row_is_held_against() -> None:
    ours = with_facts(Spec("h2o(budget=256)", "compact"), result(OURS))
    for other in (Spec(cpu="Another CPU"), Spec(engine="compiled"), Spec(model="other")):
        assert line([*with_facts(other, result(DENSE)), *ours])["score"] is None


def test_contexts_with_calibration_text_have_no_score_and_short_windows_matter_not() -> None:
    for flag, has_score in (
        ("calibration text inside the test text: 3.0% of bigbench-mysteries", False),
        ("policy never exercised by bigbench-wikipedia: the windows are no longer than what stays exact", True),
    ):
        made = board()
        next(record.quality for record in made if record.quality and record.cell.pipeline != "dense").flags.append(flag)
        found = line(made)
        assert (found["score"] is not None) == has_score and found["reason"] == (None if has_score else flag)


def test_contexts_of_which_a_policy_keeps_all_have_no_score() -> None:
    for exact, has_score in ((1.0, False), (0.999, True), (None, True)):
        found = line(board(exact_keys=exact))
        assert (found["score"] is not None) == has_score
        assert found["reason"] == (None if has_score else "policy never exercised: contexts are no longer than what stays exact")
        assert line(board(exact_keys=exact), "dense")["score"] is not None


def test_at_an_equal_score_the_setting_that_holds_the_least_stands_for_its_method() -> None:
    """Two of `h2o` find half, of which one holds less; of two of `quest` that hold as much the faster one; `tova` finds too little."""
    all_right, half = [1] * 18, [known if place % 4 else 0 for place, known in enumerate(DENSE)]
    rows = {
        "h2o(budget=96)": (half, 96_000, 20.0),
        "h2o(budget=256)": (OURS, 256_000, 19.0),
        "h2o": (all_right, 700_000, 25.0),
        "quest(budget=256)": (all_right, 1_100_000, 21.0),
        "quest": (all_right, 1_100_000, 24.0),
        "tova(budget=96)": ([0] * 18, 90_000, 18.0),
    }
    made = with_facts(Spec(), result(DENSE))
    for name, (correct, held, ms) in rows.items():
        made += with_facts(Spec(name, "compact"), result(correct, cache_bytes=held, step_ms=[ms]))
    (lines,) = retrieval.at_equal_scores(retrieval.figures(made)).values()
    of = {line["method"]: line for line in lines}
    assert list(of) == ["h2o", "dense", "quest"], "the least at half first"
    assert of["h2o"] == {
        "method": "h2o",
        "50 %: MB": "0.10",
        "50 %: ms": "20.0",
        "50 %: by": "h2o(budget=96)",
        "90 %: MB": "0.70",
        "90 %: ms": "25.0",
        "90 %: by": "h2o",
    }
    assert (of["quest"]["50 %: by"], of["quest"]["90 %: ms"], of["dense"]["90 %: MB"]) == ("quest(budget=256)", "21.0", "1.02")
    nothing = board(ours=[0] * 18)
    for record in nothing:
        if record.quality and record.cell.pipeline == "dense":
            record.quality.retrieval = [result([1] * 7 + [0] * 11)]
    assert retrieval.at_equal_scores(retrieval.figures(nothing)) == {}, "where nothing has a score there is no line"


def test_of_one_context_there_is_a_score_and_no_interval() -> None:
    made = [*with_facts(Spec(), result(DENSE, context=[0] * 18)), *with_facts(Spec("tova"), result(OURS, context=[0] * 18))]
    found = line(made, "tova")
    assert found["score"] == 9 / 13 and found["score_low"] is None and found["score_high"] is None


def test_columns_of_unequal_length_are_no_result() -> None:
    for changed in ({"context": CONTEXT[1:]}, {"depth": [0.5]}, {"correct": [1] * 17}, {"correct": [2] * 18}):
        with pytest.raises(ValueError):
            RetrievalResult.model_validate(result(DENSE).model_dump() | changed)


def test_tables_tell_it_by_length() -> None:
    tables = retrieval.tables(retrieval.figures(board()))
    first, second = tables
    assert "1,024 tokens · dense finds 13 of 18 facts" in first and "2,048 tokens" in second
    ours, dense = tables[first]
    assert (ours["method"], ours["score"], ours["MB"], ours["MB of dense"], ours["ms"]) == ("h2o(budget=256)", "69", "0.26", "1.02", "30.8")
    assert (dense["score"], dense["95 % interval"]) == ("100", "–") and ours["95 % interval"] != "–"


def test_hostile_texts_write_nothing_to_a_terminal() -> None:
    made = board()
    for record in made:
        record.cell.model = "m\x1b]0;x\x07"
    found = retrieval.figures(made)
    assert "\x1b" not in str(retrieval.tables(found)) + json.dumps(found) and "\\u001b" not in json.dumps(found)


def caches() -> list[Record]:
    """Two methods at two budgets each beside dense, at two lengths; the more is held, the more is found."""
    made = with_facts(Spec(), result(DENSE), result(DENSE, 2048))
    for name, right in (("h2o", 4), ("tova", 2)):
        for budget, more in ((128, 0), (256, 3)):
            own = with_facts(
                Spec(f"{name}(budget={budget})", "compact"),
                *(result([1] * (right + more) + [0] * (18 - right - more), length, cache_bytes=1000 * budget) for length in (1024, 2048)),
            )
            for record in own:
                record.cell.steps = [{"name": name, "method": name.upper()}]
            made += own
    return made


def test_figures_have_a_panel_for_each_length_and_a_line_for_each_method() -> None:
    made = rows(caches())
    for kind, label in (("retrieval-bytes", "MB"), ("retrieval-ms", "ms")):
        (drawn,) = figures(made, [kind])
        assert isinstance(drawn, Plot)
        axes = drawn.make().axes
        assert [ax.get_title() for ax in axes] == ["1,024 tokens", "2,048 tokens"] and label in axes[0].get_xlabel()
        lines = {line.get_label(): line for line in axes[0].lines if not str(line.get_label()).startswith("_")}
        assert set(lines) == {"dense", "H2O", "TOVA"} and list(lines["dense"].get_ydata()) == [100]  # type: ignore[arg-type]
        found = {one["method"]: one["score"] for one in retrieval.figures(caches()) if one["length"] == 1024}
        assert list(lines["H2O"].get_ydata()) == pytest.approx([100 * found[f"h2o(budget={n})"] for n in (128, 256)])  # type: ignore[arg-type]
    assert list(lines["H2O"].get_xdata()) == [30.75, 30.75]  # type: ignore[arg-type]
    (drawn,) = figures(made, ["retrieval-bytes"])
    assert isinstance(drawn, Plot) and drawn.reading.startswith("At 1,024 tokens, of what holds at most half of the bytes of dense, h2o(")
    lines = next(iter(retrieval.at_equal_scores(retrieval.figures(caches())).values()))
    least = [min((line[f"{share} %: MB"] for line in lines if line[f"{share} %: MB"] != EMPTY), key=float) for share in (50, 90)]
    takes = re.search(r"takes at least: 50 % ([\d.]+) MB \(.+\), 90 % ([\d.]+) MB \(.+\)\.$", drawn.reading)
    assert takes and [float(held) for held in takes.groups()] == pytest.approx([float(held) for held in least], abs=0.06)


def test_without_two_scores_there_is_no_figure() -> None:
    (drawn,) = figures(rows(board()), ["retrieval-bytes"])
    assert isinstance(drawn, Absent) and drawn.reason == "no two rows have a score of facts in long contexts"


def test_it_stands_below_the_table_of_the_rows() -> None:
    found = {one["length"]: one for one in retrieval.figures(caches()) if one["method"] == "h2o(budget=256)"}
    parts = [
        f"{100 * found[length]['score']:.0f} [{100 * found[length]['score_low']:.0f}–{100 * found[length]['score_high']:.0f}]"
        for length in (1024, 2048)
    ]
    page = site_files(Board.of(caches()), {}, Gallery())[names.model(caches()[0].cell.model)].decode()
    for text in (to_markdown(rows(caches())), printed(caches(), 220), page):
        table = text[text.index("Facts found in long contexts") :]
        assert all(f"{length}: {unit}" in table for length in ("1,024", "2,048") for unit in ("facts %", "MB", "ms"))
        assert all(part in table for part in parts) and parts[0] != "–" and "board retrieval" in table
    assert "Facts found in long contexts" not in to_markdown(rows(records(Spec()) + records(Spec("tova"))))


def test_a_length_without_a_score_has_bytes_and_milliseconds_in_the_table() -> None:
    text = to_markdown(rows(board(dense=[1] * (FEWEST - 1) + [0] * (19 - FEWEST))))
    (told,) = [line for line in text[text.index("### Facts found") :].splitlines() if line.startswith("| h2o")]
    assert told.split(" | ")[1:] == ["0.3", "31", "–", "– |"], "no row has a score, so there is no such column; it has nothing at 2,048"


def test_of_many_lengths_the_longest_stand_in_the_table() -> None:
    lengths = [1024 * more for more in range(1, 7)]
    made = [
        *with_facts(Spec(), *(result(DENSE, length) for length in lengths)),
        *with_facts(Spec("tova"), *(result(OURS, length) for length in lengths)),
    ]
    text = to_markdown(rows(made))
    assert [length for length in lengths if f"{length:,}: MB" in text] == lengths[2:] and "more than 4" in text


def test_a_page_says_it_in_words() -> None:
    (row,) = [row for row in rows(board()) if not row.is_reference]
    told = dict(details(row))["Facts in long contexts"]
    assert told == "1,024 tokens: 69 % (33 to 91) of those that dense finds, 0.3 MB held, 31 ms a step"


def test_the_command_prints_it_and_says_what_makes_some(tmp_path: Path) -> None:
    full, empty = Store(tmp_path / "full"), Store(tmp_path / "empty")
    for record in board():
        full.put(record)
    for record in records(Spec()):
        empty.put(record)
    told = CliRunner().invoke(app, ["board", "retrieval", "--results", str(full.root), "--format", "json"])
    assert [one["method"] for one in json.loads(told.stdout)] == ["h2o(budget=256)", "dense", "dense"]
    shown = CliRunner().invoke(app, ["board", "retrieval", "--results", str(full.root)])
    assert shown.exit_code == 0 and "dense finds 13 of 18 facts" in shown.stdout and "left out" in shown.stdout
    none = slimbench("board", "retrieval", "--results", str(empty.root))
    assert none.returncode == 2 and "suite=retrieval" in none.stderr and none.stderr.count("\n") == 1
