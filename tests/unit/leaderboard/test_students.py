"""Students of one teacher against each other: who is in a group, and what the lines say."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slimbench.harness.cli.main import app
from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store
from slimbench.leaderboard.compare import students
from slimbench.leaderboard.compare.compare import compare
from tests.support.board_records import Spec, records
from tests.unit.cli.test_cli import slimbench

SAME = "shortgpt(fraction=0.5)+"


@pytest.fixture(scope="module")
def taught(committed: list[Record]) -> list[Record]:
    """The committed records of students and of what they are held against."""
    found = [record for record in committed if record.cell.pipeline.startswith(SAME) and record.cell.suite == "screen"]
    return found + [record for record in committed if record.cell.pipeline == "dense" and record.cell.suite == "screen"]


def test_all_losses_stand_beside_kd_as_compare_has_them(taught: list[Record]) -> None:
    first, *others = students.groups(taught)
    names = [student.name for student in first.students]
    assert {"kd", "student-hard", "gkd", "kd-reverse", "kd-skew", "distilbert", "tinybert", "fitnets", "ted"} <= set(
        names
    ) and first.tokens == 102_400
    assert [student.row.perplexity for student in first.students] == sorted(student.row.perplexity or 0 for student in first.students)
    for student in first.students:
        if student.name in ("distilbert", "student-hard"):
            direct = compare(taught, student.row.label, first.base.label, suite="screen").texts[0]
            assert student.against == direct
    assert [{student.settings["seed"] for student in group.students} for group in others] == [{1}, {2}], "seeds are held apart"
    assert [student.against is None for student in first.students].count(True) == 1


def test_students_of_other_tokens_steps_or_seeds_stand_in_no_group(taught: list[Record]) -> None:
    def changed(record: Record) -> Record:
        if record.stage is not Stage.COMPRESS or "distilbert" not in record.cell.pipeline or record.compress is None:
            return record
        return record.model_copy(update={"compress": record.compress.model_copy(update={"training_tokens": 51_200})})

    assert "distilbert" not in {student.name for student in students.groups(map(changed, taught))[0].students}
    without = [record for record in taught if record.cell.pipeline != f"{SAME}kd(learning_rate=0.0002)"]
    assert all(student.settings["seed"] in (1, 2) for group in students.groups(without) for student in group.students), (
        "nothing to compare with"
    )
    assert students.groups([record for record in taught if record.cell.pipeline == "dense"]) == []
    merged = [record for record in taught if not record.cell.pipeline.endswith("+gptq")]
    assert {s.name for g in students.groups(taught) for s in g.students} == {s.name for g in students.groups(merged) for s in g.students}
    foreign = [record.model_copy(update={"foreign": True}) for record in taught]
    assert students.groups(foreign) == []


def test_students_that_began_from_other_parameters_stand_in_no_group(taught: list[Record]) -> None:
    starts: dict[str, str | None] = {"kd": "a", "distilbert": "b", "tinybert": "a", "ted": None}

    def changed(record: Record) -> Record:
        name = record.cell.pipeline.removeprefix(SAME).partition("(")[0]
        if record.stage is not Stage.COMPRESS or name not in starts or record.compress is None:
            return record
        claim = record.compress.claim
        training = {key: value for key, value in claim.details.get("training", {}).items() if key != "start_sha256"}
        told = {"training": training | ({"start_sha256": starts[name]} if starts[name] else {})}
        compress = record.compress.model_copy(update={"claim": replace(claim, details=claim.details | told)})
        return record.model_copy(update={"compress": compress})

    only = [record for record in taught if record.cell.pipeline.removeprefix(SAME).partition("(")[0] in {*starts, "dense"}]
    found = {student.name for student in students.groups(map(changed, only))[0].students}
    assert found == {"kd", "tinybert", "ted"}, "one that does not tell is held to be of the same"
    two = [record for record in only if not any(f"+{name}(" in record.cell.pipeline for name in ("tinybert", "ted"))]
    assert not [group for group in students.groups(map(changed, two)) if group.tokens == 102_400 and len(group.students) > 1]


def test_the_lines_say_by_how_much(taught: list[Record]) -> None:
    group = students.groups(taught)[0]
    said = {line["student"]: line for line in students.lines(group)}
    assert said["kd"]["against kd"] == "–" and said["student-hard"]["against kd"].startswith("+") and said["student-hard"]["p"] == "< 0.001"
    assert "102,400 tokens · screen · 64 windows" in students.title(group) and "shortgpt(fraction=0.5) ·" in students.title(group)
    whole = students.groups(taught)
    table = students.markdown(whole)
    assert table.count("\n| ") == sum(len(one.students) for one in whole) + 2, "seeds stand in one table"
    assert table.startswith("**smollm2-135m")


def test_odd_records_end_nothing_and_write_nothing_to_a_terminal(taught: list[Record]) -> None:
    odd = {"seed": [1, {"a": 2}], "learning_rate": "\x1b[2J", "steps": None}

    def changed(record: Record) -> Record:
        if "distilbert" not in record.cell.pipeline and f"{SAME}kd(" not in record.cell.pipeline:
            return record
        *before, last = record.cell.steps
        steps = [*before, last | {"settings": last["settings"] | odd}]
        return record.model_copy(update={"cell": record.cell.model_copy(update={"steps": steps, "model": "m\x1b]0;x\x07"})})

    for group in students.groups(map(changed, taught)):
        said = students.title(group) + str(students.lines(group)) + str(students.figures(group))
        assert "\x1b" not in said and "\\x1b" not in said


def test_the_command_prints_them_and_says_what_makes_some(taught: list[Record], tmp_path: Path) -> None:
    few, many = Store(tmp_path / "few"), Store(tmp_path / "many")
    for record in records(Spec()):
        few.put(record)
    for record in taught:
        many.put(record)
    told = CliRunner().invoke(app, ["board", "students", "--results", str(many.root), "--format", "csv"])
    lines = {line["student"]: line for line in csv.DictReader(io.StringIO(told.stdout)) if line["seed"] == "0"}
    assert {"kd", "distilbert"} <= set(lines) and 0.9 < float(lines["distilbert"]["ratio"]) < 1
    shown = CliRunner().invoke(app, ["board", "students", "--results", str(many.root)])
    assert shown.exit_code == 0 and "student-hard" in shown.stdout and "not tuned" in shown.stdout
    none = slimbench("board", "students", "--results", str(few.root))
    assert none.returncode == 2 and "slimbench sweep experiment=distillation" in none.stderr
