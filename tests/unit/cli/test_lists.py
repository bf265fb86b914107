"""What prints a list prints it for programs too."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

import slimbench as package
from slimbench.harness.measure.hardware import hardware
from slimbench.harness.store.store import Store, StoreError
from slimbench.leaderboard.rows.row import Row
from slimbench.util.text import nearest
from tests.support.board_records import Spec, records
from tests.support.paths import ROOT
from tests.unit.cli.test_cli import slimbench


@pytest.fixture
def results(tmp_path: Path) -> str:
    for spec in (Spec(), Spec("gptq", "quantization", loss=1.3, bits=4.25, size=0.426)):
        for record in records(spec):
            Store(tmp_path / "results").put(record)
    return str(tmp_path / "results")


@pytest.mark.parametrize(
    ("command", "first", "keys"),
    [
        (("engines", "list"), "transformers", ["engine", "formats", "devices", "here"]),
        (("assets", "list"), "smollm2-135m", ["asset", "source", "cached"]),
        (("env", "list"), "llamacpp", ["environment", "for", "installs", "made"]),
    ],
)
def test_lists_are_json_csv_and_markdown(command: tuple[str, ...], first: str, keys: list[str]) -> None:
    rows = json.loads(slimbench(*command, "--format", "json").stdout)
    assert [*rows[0]] == keys and first in {row[keys[0]] for row in rows}
    read = list(csv.DictReader(io.StringIO(slimbench(*command, "--format", "csv").stdout)))
    assert [row[keys[0]] for row in read] == [row[keys[0]] for row in rows]
    assert slimbench(*command, "--format", "md").stdout.startswith("| ")
    assert first in slimbench(*command).stdout
    wrong = slimbench(*command, "--format", "jsn")
    assert wrong.returncode == 2 and "did you mean 'json'" in wrong.stderr


@pytest.mark.skipif(bool(hardware().gpus), reason="there is a card")
def test_an_engine_for_cards_is_not_here_without_one() -> None:
    here = {row["engine"]: row["here"] for row in json.loads(slimbench("engines", "list", "--format", "json").stdout)}
    assert here["semi-structured"] == here["vllm"] == "needs a cuda device" and here["transformers"] == "yes"


def test_only_the_chosen_columns(results: str) -> None:
    table = ("board", "table", "--results", results, "--columns", "pipeline, keys,perplexity")
    rows = json.loads(slimbench(*table, "--format", "json").stdout)
    assert [list(row) for row in rows] == [["pipeline", "keys", "perplexity"]] * 2
    assert {row["pipeline"] for row in rows} == {"dense", "gptq"} and all(row["perplexity"] > 1 for row in rows)
    head, *lines = slimbench(*table, "--format", "csv").stdout.splitlines()
    assert head == "pipeline,keys,perplexity" and len(lines) == 2
    wrong = slimbench("board", "table", "--results", results, "--columns", "perplexty")
    assert wrong.returncode == 2 and "did you mean 'perplexity'" in wrong.stderr


def test_load_gives_the_table_and_costs_nothing_before(results: str) -> None:
    frame = package.load(results)
    table = json.loads(slimbench("board", "table", "--results", results, "--format", "json").stdout)
    assert list(frame.columns) == list(table[0]) == list(Row.model_fields)
    assert frame.astype(object).where(frame.notna(), None).to_dict("records") == table
    with pytest.raises(StoreError, match="no results folder"):
        package.load("no-such-folder")
    code = "import sys; import slimbench; print([m for m in ('pandas', 'numpy', 'torch', 'pydantic', 'typer') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_schema_in_the_documentation_is_that_of_today() -> None:
    printed = slimbench("records", "schema").stdout
    assert json.loads(printed)["title"] == "Record"
    kept = (ROOT / "docs" / "record.schema.json").read_text()
    assert kept == printed, "run `slimbench records schema > docs/record.schema.json`"


def test_choices_are_in_the_order_of_numbers() -> None:
    assert nearest("zzzz", ["128", "256", "32"]) == "; choices: 32, 128, 256"
    assert nearest("?", ["rtn-16bit", "rtn-4bit", "awq"]) == "; choices: awq, rtn-4bit, rtn-16bit"


def test_of_many_choices_the_nearest_are_named() -> None:
    hint = nearest("zzz", [f"rtn-{bits}bit" for bits in range(200)])
    assert hint.startswith("; of 200 choices the nearest are rtn-") and hint.count(",") == 5
