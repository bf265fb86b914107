"""`slimbench methods list` and `show`: filters, formats, engines, and what came of each method."""

from __future__ import annotations

import csv
import io
import json
import os

import pytest

from slimbench.harness.config.registry import entries
from slimbench.harness.schema.identity import Stage, Status
from slimbench.leaderboard.rows.outcomes import outcomes
from slimbench.util.silence import libraries_silenced
from tests.support import board_records
from tests.support.paths import ROOT
from tests.unit.cli.test_cli import slimbench


def listed(*options: str) -> list[dict[str, object]]:
    done = slimbench("methods", "list", "--format", "json", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_method_is_listed_with_its_format_and_engines() -> None:
    rows = {str(row["method"]): row for row in listed()}
    assert list(rows) == [entry.name for entry in entries()]
    assert rows["rtn-4bit"]["format"] == "packed" and {"transformers", "compiled"} <= set(rows["rtn-4bit"]["engines"])  # type: ignore[arg-type]
    assert rows["gguf-q4_0"]["engines"] == ["llamacpp"]
    text = slimbench("methods", "list", "--format", "csv").stdout
    assert [row["method"] for row in csv.DictReader(io.StringIO(text))] == list(rows)
    assert all(f"| {name} |" in slimbench("methods", "list", "--format", "md").stdout for name in ("gptq", "dense"))
    assert "rtn-4bit" in slimbench("methods", "list").stdout


def test_filters_keep_what_they_say() -> None:
    assert {row["family"] for row in listed("--family", "pruning")} == {"pruning"}
    needing = listed("--needs", "calibration")
    assert all("calibration" in row["needs"] for row in needing) and "gptq" in {row["method"] for row in needing}  # type: ignore[operator]
    free = listed("--needs", "nothing")
    assert all(row["needs"] == [] for row in free) and "rtn-4bit" in {row["method"] for row in free}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--family", "prunning"), "did you mean 'pruning'"),
        (("--needs", "calibrtion"), "did you mean 'calibration'"),
        (("--format", "jsn"), "did you mean 'json'"),
        (("--results", "no-such-folder"), "no results folder"),
    ],
)
def test_a_wrong_option_is_one_line(options: tuple[str, ...], expected: str) -> None:
    done = slimbench("methods", "list", *options)
    assert done.returncode == 2 and expected in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_method_is_ok_where_each_stage_that_was_tried_ended_well_once() -> None:
    bad = {Stage.QUALITY: (Status.OOM, board_records.failure("no room"))}
    refused = {Stage.COMPRESS: (Status.UNSUPPORTED, board_records.failure("no card"))}
    specs = [
        board_records.Spec("gptq", ends=bad),
        board_records.Spec("gptq", engine="compiled"),
        board_records.Spec("awq", ends=bad),
        board_records.Spec("nf4", ends=refused),
        board_records.Spec("gptq", model="other", ends=refused),
    ]
    found = outcomes([record for spec in specs for record in board_records.records(spec)])
    assert found == {
        "gptq": {"tiny-135m": "ok", "other": "compress unsupported"},
        "awq": {"tiny-135m": "quality oom"},
        "nf4": {"tiny-135m": "compress unsupported"},
    }


def test_results_add_what_came_of_each_method() -> None:
    rows = {row["method"]: row for row in listed("--results", str(ROOT / "results"))}
    assert rows["gptq-minmax"]["smollm2-135m"] == "ok" and rows["gptq"]["random-135m"] is None


def test_show_names_engines_and_the_systems_that_are_covered() -> None:
    text = slimbench("methods", "show", "gptq").stdout
    assert "engines     transformers, compiled" in text and "covers      GPTQ / OPTQ" in text and "comes near  OBQ: " in text
    assert "  group_size = 64" in text and "  observer = mse" in text and "method.gptq.SETTING=VALUE" in text


def test_a_proof_says_what_was_claimed_and_nothing_of_what_libraries_say() -> None:
    done = slimbench("methods", "check", "rtn-4bit")
    assert done.returncode == 0 and done.stderr == ""
    assert "claim           format packed, bits 4, group_size 64, symmetric True" in done.stdout and "rtn-4bit: passed" in done.stdout


def test_what_libraries_say_is_shown_where_an_error_follows(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), libraries_silenced():
        os.write(2, b"a hint of the library\n")
        raise RuntimeError
    with libraries_silenced():
        os.write(2, b"noise\n")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "a hint of the library\nafter\n"
