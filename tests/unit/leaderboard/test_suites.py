"""Tables of a user's own suites: named by what differs, one for each text wherever it lies, nothing empty in them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from slimbench.harness.config.compose import resolve
from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.record import Record
from slimbench.leaderboard.compare.compare import compare
from slimbench.leaderboard.rows.changes import changes, protocol
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.tables.tables import tables
from slimbench.leaderboard.tables.writers import to_terminal
from tests.support.board_records import Spec, records

QUICK = {"name": "quick", "corpus": ["bigbench-wikipedia"], "protocols": ["window"], "seqlen": 512, "windows": 16, "limit": 32}
GPTQ = Spec("gptq", "quantization", loss=1.3, bits=4.25, size=0.426)


def _with(spec: Spec, **suite: Any) -> list[Record]:
    made = records(spec)
    for record in made:
        record.config["suite"] = QUICK | suite
    return made


@pytest.mark.parametrize(
    ("suite", "text"),
    [
        ({}, None),
        ({"windows": 4}, "windows=4"),
        ({"corpus": ["file:/home/me/text/corpus.txt"], "windows": 4}, "corpus=file:corpus.txt, windows=4"),
        ({"corpus": "bigbench-wikipedia", "batch_tokens": 7}, None),
        ({"tasks": ["a", "b"], "include_path": "/home/me/tasks"}, "tasks=[a,b], include_path=file:tasks"),
        ({"tasks": [f"task_number_{i}" for i in range(9)]}, "tasks=[9 of them]"),
        ({"name": "../../quick", "windows": 4}, None),
        ({"name": "mine", "windows": 4}, None),
        ({"limit": None}, "limit=null"),
        ({"num_fewshot": 5, "chunk": 64, "include_path": ["asset:bigbench"]}, "num_fewshot=5"),
        ({"include_path": ["/home/me/tasks", "asset:bigbench"]}, "include_path=[file:tasks,asset:bigbench]"),
        ({"retrieval": None}, None),
        ({"retrieval": {"corpus": "file:/home/me/story.txt", "seed": 3}}, "retrieval.corpus=file:story.txt, retrieval.seed=3"),
        ({"retrieval": {"\x1b]0;x": 1}}, None),
    ],
)
def test_a_suite_is_named_by_what_differs_from_the_shipped_one(suite: dict[str, Any], text: str | None) -> None:
    assert changes(QUICK | suite) == text


def test_the_title_says_it() -> None:
    plain, changed = _with(Spec(suite="quick")), _with(Spec(suite="quick", seed=1, corpora=("mine",)), corpus=["file:a/b.txt"], windows=4)
    found = {table.title for table in tables(rows([*plain, *changed]))}
    assert found == {"tiny-135m · quick", "tiny-135m · quick, corpus=file:b.txt, windows=4"}


def test_one_text_is_one_table_wherever_it_lies() -> None:
    """The dense cell is measured once; the second spelling of its path must not part a method from it."""
    made = [*_with(Spec(), corpus=["file:/somewhere/text/corpus.txt"]), *_with(GPTQ, corpus=["file:corpus.txt"])]
    (table,) = tables(rows(made))
    assert {row.pipeline for row in table.rows} == {"dense", "gptq"}
    assert compare(made, "gptq", "dense").texts
    other = Spec("rtn", "quantization", corpora=("another",))
    reference = other.reference()
    apart = [*made, *_with(reference, corpus=["file:corpus.txt"]), *_with(other, corpus=["file:corpus.txt"])]
    assert len(tables(rows(apart))) == 2, "another text of the same name is another table"


@pytest.mark.parametrize("width", [80, 200])
def test_columns_of_dashes_are_left_out(width: int) -> None:
    made = [record for record in records(Spec()) + records(GPTQ) if record.stage is not Stage.SPEED]
    for record in made:
        if record.quality and record.quality.evidence:
            record.quality.evidence.kernel = None
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(to_terminal(rows(made)))
    text = console.export_text()
    head = next(line for line in text.splitlines() if "Pipeline" in line)
    assert "Δ\N{NO-BREAK SPACE}%" in head and not any(word in head for word in ("Tokens/s", "Roof", "Prefill", "Kernel"))


def test_the_names_of_shipped_suites_say_nothing_of_folders(tmp_path: Path) -> None:
    assert changes(QUICK | {"corpus": [f"file:{tmp_path}/secret/x.txt"]}) == "corpus=file:x.txt"


def test_a_shipped_suite_that_asks_of_contexts_is_itself_whole_as_records_have_it() -> None:
    shipped = resolve(["suite=retrieval"]).suite.model_dump(mode="json")
    assert changes(shipped) is None
    assert changes(shipped | {"retrieval": shipped["retrieval"] | {"contexts": 3}}) == "retrieval.contexts=3"
    assert changes(shipped | {"retrieval": None}) == "retrieval=null"
    places = [shipped | {"retrieval": shipped["retrieval"] | {"corpus": f"file:{folder}/story.txt"}} for folder in ("a", "b")]
    assert protocol(places[0]) == protocol(places[1]) != protocol(shipped)
