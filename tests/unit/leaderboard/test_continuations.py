"""Continuations on the board: paired with the reference's of the same engine, the worst prompts on the page, hostile text as text."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.record import Record
from slimbench.harness.store import shared
from slimbench.harness.store.store import Store, dump
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.site import names
from slimbench.leaderboard.tables.latex import to_latex
from slimbench.leaderboard.tables.writers import to_markdown, to_terminal
from tests.support.board_records import Spec, records, write
from tests.unit.leaderboard.test_site import HOSTILE, Elements, site

DENSE, GPTQ = Spec(), Spec("gptq", "quantization", loss=1.3)
OTHER = replace(GPTQ, engine="other")
SAME = [[7, 8, 9, 10]] * 8
APART = [[7, 8, 9, 10], [7, 8, 9, 1], [7, 8, 1, 2], [7, 1, 2, 3], [1, 2, 3, 4], [7, 8, 9, 1], [1, 8, 9, 10], [7, 8, 9, 10]]


def row(made: list[Record], **wanted: str) -> Row:
    (found,) = (row for row in rows(made) if all(getattr(row, name) == value for name, value in wanted.items()))
    return found


def test_a_row_is_held_against_the_reference_prompt_by_prompt() -> None:
    dense, gptq = records(DENSE), records(GPTQ)
    write(dense, SAME)
    write(gptq, APART)
    found = row(dense + gptq, pipeline="gptq")
    assert (found.continuations, found.continuation_tokens, found.same_continuations) == (8, 4, 0.25)
    assert found.first_divergent == (4 + 3 + 2 + 1 + 0 + 3 + 0 + 4) / 8
    assert found.divergent_share == (0 + 1 + 2 + 3 + 4 + 1 + 1 + 0) / 32
    assert found.divergent_by_kind == {"question": (0 + 2 + 4 + 1) / 16, "code": (1 + 3 + 1 + 0) / 16}
    assert found.divergent_at_ties is None, "nobody looked where the reference is undecided"
    reference = row(dense + gptq, pipeline="dense")
    assert reference.continuations is None and reference.divergent_share is None and reference.continuations_reason is None


def test_it_is_told_how_many_part_where_the_reference_is_undecided() -> None:
    dense, gptq = records(DENSE), records(GPTQ)
    write(dense, SAME)
    write(gptq, APART)
    for record in dense:
        if record.quality and record.quality.generation:
            record.quality.generation.ties = [[0], [3], [1, 3], [], [0, 1], [3], [1], [0]]
    found = row(dense + gptq, pipeline="gptq")
    assert found.divergent_at_ties == 3 / 6, "the second, fifth and sixth of six; the first and the last do not part"
    assert "50 % of the others" in Elements(site(dense + gptq)[names.cell(found)]).text
    assert row(dense + gptq, pipeline="dense").divergent_at_ties is None


def test_other_prompts_and_other_engines_are_not_compared_and_the_row_says_so() -> None:
    dense, there, gptq = records(DENSE), records(OTHER), records(GPTQ)
    write(dense, SAME)
    write(there, APART)
    write(gptq, APART, prompts=[f"Another {n}" for n in range(8)])
    made = dense + there + gptq
    on_other, asked_otherwise = row(made, engine="other"), row(made, pipeline="gptq", engine="transformers")
    words = "the reference has not continued these prompts on this engine and machine"
    assert on_other.divergent_share is asked_otherwise.divergent_share is None
    assert on_other.continuations_reason == f"{words}, only transformers on {on_other.hardware}"
    assert asked_otherwise.continuations_reason == words
    page = Elements(site(made)[names.cell(on_other)]).text
    assert f"not compared: {on_other.continuations_reason}" in page and "departs most" not in page


def test_the_page_shows_the_five_prompts_that_go_furthest_astray_as_text() -> None:
    dense, gptq = records(DENSE), records(GPTQ)
    texts = [*HOSTILE[:7], "<b>same</b>"]
    write(dense, SAME, [f"dense {text}" for text in texts], texts)
    write(gptq, APART, [f"gptq {text}" for text in texts], texts)
    made = site(dense + gptq)
    html = made[names.cell(row(dense + gptq, pipeline="gptq"))]
    start = html.index("Where it departs most from the reference")
    table = Elements(html[start : html.index("</table>", start)])
    order = [table.text.index(f"dense {texts[place]}") for place in (4, 3, 2, 6, 1)]
    assert order == sorted(order), "the largest share first, at equal shares the earliest difference"
    assert f"dense {texts[5]}" not in table.text and "same" not in table.text
    assert not {tag for tag, _ in table.found} - {"h3", "div", "table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert not any(name.startswith("on") for _, attributes in table.found for name in attributes)
    assert "departs most" not in made[names.cell(row(dense + gptq, pipeline="dense"))]


def test_long_texts_are_cut() -> None:
    dense, gptq = records(DENSE), records(GPTQ)
    write(dense, SAME, ["y" * 5000] * 8)
    write(gptq, APART, ["x" * 5000] * 8)
    html = site(dense + gptq)[names.cell(row(dense + gptq, pipeline="gptq"))]
    assert "x" * 250 in html and "x" * 301 not in html and "y" * 301 not in html


def test_prompts_are_stored_once_and_records_without_any_stay_as_they_were(tmp_path: Path) -> None:
    without, dense, gptq = records(Spec(model="old")), records(DENSE), records(GPTQ)
    before = dump(without[1])
    write(dense, SAME)
    write(gptq, APART)
    made = without + dense + gptq
    for record in made:
        Store(tmp_path).put(record)
    assert [path.name.partition("-")[0] for path in sorted((tmp_path / shared.FOLDER).iterdir())].count("prompts") == 1
    assert sorted(map(dump, Store(tmp_path).scan()[0])) == sorted(map(dump, made))
    assert b"generation" not in before


def alone(spec: Spec) -> list[Record]:
    """The records of a cell whose suite has neither texts nor tasks, and that was not timed."""
    made = [record for record in records(spec) if record.stage is not Stage.SPEED]
    for record in made:
        if record.quality:
            record.quality.perplexity, record.quality.documents, record.quality.zeroshot = [], [], []
    return made


def test_rows_of_continuations_alone_show_them_and_make_up_nothing() -> None:
    dense, gptq = alone(DENSE), alone(GPTQ)
    write(dense, SAME)
    write(gptq, APART)
    board = rows(dense + gptq)
    assert [found.pipeline for found in board] == ["dense", "gptq"]
    reference, found = board
    assert (found.divergent_share, found.same_continuations) == (12 / 32, 0.25)
    for each in board:
        assert each.corpus is each.perplexity is each.perplexity_delta_percent is each.kl_mean is each.accuracy is each.rank is None
        assert each.perplexity_by_protocol == each.task_accuracy == {}
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(to_terminal(board))
    text = console.export_text()
    head = next(line for line in text.splitlines() if "Pipeline" in line)
    assert "Divergent" in head and not any(word in head for word in ("Perplexity", "KL", "Accuracy"))
    assert "37.5" in next(line for line in text.splitlines() if "gptq" in line)
    header, _, _, line = (line.split(" | ") for line in to_markdown(board).splitlines() if line.startswith("|"))
    cells = dict(zip(header, line, strict=True))
    assert not {"Perplexity", "KL", "Accuracy %"} & cells.keys() and cells["Divergent\N{NO-BREAK SPACE}%"].startswith("37.5")
    assert "37.5" in next(line for line in to_latex(board).splitlines() if line.startswith("gptq"))
    page = Elements(site(dense + gptq)[names.cell(found)]).text
    assert "2 of 8 prompts, 4 tokens each" in page and "Where it departs most from the reference" in page
    assert not re.search(r"\bnan\b", page, re.IGNORECASE)
    assert "departs most" not in site(dense + gptq)[names.cell(reference)]
