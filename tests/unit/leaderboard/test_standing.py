"""Where a cell stands: its places and fronts, plain rounding beside it, and what it would cost to tell the rest apart."""

from __future__ import annotations

from dataclasses import replace
from html import unescape

import pytest

from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.record import Record
from slimbench.harness.stats.significance import LEVEL
from slimbench.leaderboard.compare.compare import compare
from slimbench.leaderboard.compare.rounding import rounding_of
from slimbench.leaderboard.figures.plots import Gallery
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.site import apart, names
from slimbench.leaderboard.site.board import Board
from slimbench.leaderboard.site.standing import beside_rounding, standing
from slimbench.leaderboard.verdicts.cost import seconds_per_item, unresolved
from tests.support.board_records import Spec, records, site_files

DENSE = Spec()
RTN = Spec("rtn-4bit", "quantization", loss=1.3, decode_ms=24.0, bits=4.25, size=0.42)
RTN8 = Spec("rtn-8bit", "quantization", loss=1.004, decode_ms=30.0, bits=8.02, size=0.6)
BETTER = Spec("good", "quantization", loss=1.1, decode_ms=25.0, bits=4.5, size=0.43)
SAME = Spec("mine", "quantization", loss=1.301, decode_ms=26.0, bits=4.25, size=0.42)
CACHE = Spec("kv", "quantization", loss=1.02, decode_ms=50.0, bits=16.0)


SETTINGS = {"rtn-4bit": {}, "rtn-8bit": {"bits": 8, "group_size": None}, "rtn-4bit-asym": {"symmetric": False}}
"""Of the pipelines that only round, as their names say."""


def _records(*specs: Spec) -> list[Record]:
    """Their records, of which those of `SETTINGS` only round."""
    made = [record for spec in specs for record in records(spec)]
    for record in made:
        name = record.cell.pipeline
        step = {"name": name, "method": "rtn" if name in SETTINGS else name, "settings": SETTINGS.get(name, {})}
        record.cell = record.cell.model_copy(update={"steps": [step]})
    return made


def _board(*specs: Spec) -> tuple[Board, dict[str, Row]]:
    board = Board.of(_records(*specs))
    return board, {row.pipeline: row for row in board.rows}


def test_plain_rounding_is_that_of_no_more_bits_and_hardly_fewer_on_the_same_engine() -> None:
    elsewhere = replace(SAME, engine="compiled", pipeline="alone")
    board, found = _board(DENSE, RTN, RTN8, BETTER, SAME, CACHE, elsewhere)
    rivals = {name: rounding_of(row, board.rows, board.index) for name, row in found.items()}
    none = dict.fromkeys(("dense", "rtn-4bit", "rtn-8bit", "kv", "alone"))
    assert {name: rival and rival.pipeline for name, rival in rivals.items()} == none | {"good": "rtn-4bit", "mine": "rtn-4bit"}


def test_of_several_rows_of_rounding_the_one_of_the_same_grid_is_taken() -> None:
    board, found = _board(DENSE, RTN, replace(RTN, pipeline="rtn-4bit-asym", loss=1.2, size=0.5), SAME)
    grids = {"rtn-4bit": "symmetric, min-max", "rtn-4bit-asym": "with offsets, min-max"}
    rows = [row.model_copy(update={"grid": grids.get(row.pipeline, "with offsets, min-max")}) for row in found.values()]
    rival = rounding_of(next(row for row in rows if row.pipeline == "mine"), rows, board.index)
    assert rival and rival.pipeline == "rtn-4bit-asym"


def test_better_than_rounding_is_said_only_where_compare_shows_it() -> None:
    made = _records(DENSE, RTN, BETTER, SAME)
    board = Board.of(made)
    for row in board.rows:
        if row.pipeline not in ("good", "mine"):
            continue
        text = compare(made, row.pipeline, "rtn-4bit").texts[0]
        said = beside_rounding(board, row)
        assert said and text.p is not None and said.href == names.cell(next(r for r in board.rows if r.pipeline == "rtn-4bit"))
        is_better = text.p < LEVEL and text.ratio.value < 1
        assert is_better == (row.pipeline == "good"), "the two specs are made to differ in this"
        assert said.before == f"{row.label} is {'' if is_better else 'not '}better than plain rounding here,"
        assert f"{100 * abs(text.ratio.value - 1):.1f} % " in said.after and "95 % interval" in said.after


def test_a_cell_says_its_places_its_fronts_and_what_beats_it() -> None:
    board, found = _board(DENSE, RTN, BETTER, SAME)
    told = {name: [f"{s.before} {s.name}{s.after}" for s in standing(board, row)] for name, row in found.items()}
    for name, row in found.items():
        level = sum(o.rank <= row.rank_last and row.rank <= o.rank_last for o in board.rows if o is not row)  # type: ignore[operator]
        assert told[name][0].startswith("Place") and (f"not told apart from {level} of" in told[name][0]) == (level > 0)
    assert "On the front of size: no cell of the set loses less and is as small." in " ".join(told["good"])
    small = next(text for text in told["mine"] if "front of size" in text)
    assert small.startswith("Not on the front of size: rtn-4bit loses less and is as small; mine has a perplexity ")
    fast = next(text for text in told["mine"] if "front of speed" in text)
    assert fast.startswith("Not on the front of speed: good loses less and is as fast; mine has a perplexity ")


def test_a_row_whose_quality_a_flag_takes_away_is_held_against_no_front() -> None:
    board, found = _board(DENSE, RTN, replace(BETTER, flags=("not causal: what it answers depends on later tokens",)))
    said = [item.before for item in standing(board, found["good"])]
    assert sum(text.startswith("On no front of ") for text in said) == 2


def test_the_page_of_a_cell_names_its_record_files_and_that_of_a_method_its_standing_first() -> None:
    board = Board.of(_records(DENSE, RTN, SAME))
    files = {name: unescape(content.decode()) for name, content in site_files(board, {}, Gallery()).items() if name.endswith(".html")}
    row = next(row for row in board.rows if row.pipeline == "mine")
    page = files[names.cell(row)]
    for stage in Stage:
        assert f"{stage}-" in page.partition("Records: ")[2].partition("</p>")[0]
    assert page.index("not better than plain rounding here") < page.index('<dl class="tiles">')
    method = files[names.method("mine")]
    assert method.index("not better than plain rounding here") < method.index("About</h2>")


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.2, "4 s"), (89, "89 s"), (90, "2 min"), (5400, "1.5 h"), (172_800, "2 days"), (1e7, "116 days")]
)
def test_times_are_for_people(seconds: float, text: str) -> None:
    assert apart.duration(seconds) == text


def test_the_cost_is_what_is_needed_at_the_rate_that_was_recorded() -> None:
    made = _records(DENSE, replace(SAME, loss=1.008), replace(RTN, loss=1.012))
    for record in made:
        if record.quality and record.cell.pipeline != "rtn-4bit":
            record.quality.seconds = {"wikipedia window 512": 2.0 * len(record.quality.perplexity[0].window_nll), "zero-shot": 30.0}
    board = Board.of(made)
    found = {one.row.pipeline: one for one in unresolved(board.rows, board.index, "perplexity")}
    assert found, "the specs lie about the margin"
    for one in found.values():
        quality = board.index.quality_of(one.row)
        assert quality and (seconds_per_item(quality, "perplexity") is None) == (one.row.pipeline == "rtn-4bit")
        assert one.needed == one.row.perplexity_needed and one.shared == one.row.perplexity_windows
        assert one.seconds == (None if one.needed is None else pytest.approx(2.0 * one.needed)), (
            "without a time of its own that of its engine"
        )
        assert one.needed is None or one.needed > one.shared
    page = apart.render(board)
    assert "would resolve" in page and "of one machine" in page


def test_pairs_and_groups_are_those_of_the_ranks() -> None:
    board, _ = _board(DENSE, RTN8, RTN, SAME, BETTER)
    ranked = [row for row in board.rows if row.rank is not None and row.rank_last is not None]
    told = sum(a.rank_last < b.rank or b.rank_last < a.rank for i, a in enumerate(ranked) for b in ranked[i + 1 :])  # type: ignore[operator]
    page = unescape(apart.render(board))
    assert f"Of {len(ranked) * (len(ranked) - 1) // 2} pairs of the {len(ranked)} ranked rows, {told} are told apart." in page
    groups = page.partition("may hold one place</summary>")[2].partition("</details>")[0]
    spans = [(row.label, row.rank, row.rank_last) for row in ranked if row.rank and row.rank_last]
    level = [(a, b) for a, first, last in spans for b, its_first, its_last in spans if a < b and first <= its_last and its_first <= last]
    assert level and all(any(all(name in line for name in pair) for line in groups.split("<tr>")) for pair in level)
