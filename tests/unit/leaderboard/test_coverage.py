"""The coverage table: every surveyed system has one answer, and what is noted agrees with what the methods claim."""

from __future__ import annotations

import ast
import csv
import io
import json
from collections import Counter
from pathlib import Path

import pytest

from slimbench.harness.config import engines
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.registry import entries
from slimbench.harness.config.sources import read_yaml, shipped
from slimbench.leaderboard import coverage
from slimbench.leaderboard.coverage import Answer, Notes, Status, System
from tests.support.paths import ROOT
from tests.unit.cli.test_cli import slimbench

MATHEMATICS = ("tests/unit/methods/*/**/test_*.py", "tests/integration/test_*.py")
"""Where tests hold what a method computes, beside the contract suite, which holds what all promise."""
FORMULAS = ROOT / "tests/unit/methods/formulas.yaml"
"""Which test holds the formula of each system that is pruned or recovered here."""
FOUND = [
    System("pruning/a", "2.1 First", "A", "2020", "survey"),
    System("pruning/b", "2.1 First", "B", "2021", "survey"),
    System("pruning/c", "2.2 Second", "C", "", "added"),
    System("peft/d", "PEFT", "D", "2022", "survey"),
]
COVERS = {"one": ("pruning/a",), "two": ("pruning/a",)}
NOTES = Notes(
    engines={"peft/d": ("transformers",)},
    approximated={"pruning/b": ("one", "smaller")},
    missing={},
    defaults={"2.2": "no code", "pruning": "not built yet"},
)


def test_the_survey_has_its_329_systems() -> None:
    found = coverage.systems()
    assert len(found) == 329 == len({system.id for system in found})
    assert Counter(system.origin for system in found) == {"survey": 301, "added": 28}
    assert sum(system.branch == "quantization" for system in found) == 86
    assert all(system.system and system.section for system in found)


def test_every_system_has_one_answer_and_every_answer_names_what_exists() -> None:
    assert coverage.problems(coverage.systems(), coverage.registered(), shipped("engine"), coverage.notes(), shipped("model")) == []


def test_what_a_method_covers_is_held_by_a_test_of_that_method() -> None:
    classes = [type(entry.method) for entry in entries()]
    claimed = {(id_, f"{cls.__module__}.{cls.__name__}") for cls in classes for id_ in cls.citation.covers}
    tested = {name for pattern in MATHEMATICS for file in ROOT.glob(pattern) for name in imported(file)}
    assert len(claimed) > 50 and "slimbench.methods.dense.Dense" in tested
    assert [f"{id_}: no test imports {name}" for id_, name in sorted(claimed) if name not in tested] == []


BRANCHES = ("pruning", "distillation", "peft", "compact", "dynamic")


def test_every_answer_names_the_tests_that_hold_its_formula() -> None:
    held = read_yaml(FORMULAS)
    classes = {entry.name: f"{type(entry.method).__module__}.{type(entry.method).__name__}" for entry in entries()}
    classes |= {engine.name: engine.target for engine in engines.catalogue()}
    models = set(shipped("model"))
    answered = [answer for branch in BRANCHES for answer in coverage.table(branch) if answer.status is not Status.MISSING]
    assert sorted(held) == sorted(answer.system.id for answer in answered)
    for answer, place in ((each, place) for each in answered for place in places(held[each.system.id])):
        file, _, tests = place.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert set(tests.split()) <= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, place
        owners = {classes[name] for name in answer.methods if name in classes}
        named = {word for name in models & set(answer.methods) for word in (f'"{name}"', f'"random-{name}"')}
        if any(isinstance(node, ast.Constant) and f'"{node.value}"' in named for node in ast.walk(tree)):
            continue
        assert owners & imported(ROOT / file) or {name.rpartition(".")[0] for name in owners} & modules(ROOT / file), answer.system.id


def places(held: str | list[str]) -> list[str]:
    """`file::tests` of each file where tests of a system stand: of one, or of several."""
    return [held] if isinstance(held, str) else held


def modules(file: Path) -> set[str]:
    """The modules of which a file takes something."""
    return {node.module or "" for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)}


def imported(file: Path) -> set[str]:
    """The dotted paths that a file takes from other modules by name."""
    found = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    return {f"{node.module}.{alias.name}" for node in found for alias in node.names}


def test_every_quantization_system_has_an_answer_of_its_own() -> None:
    assert not {"quantization", *(f"1.{n}" for n in range(1, 8))} & set(coverage.notes().defaults)


def test_answers_follow_from_methods_engines_and_notes() -> None:
    found = coverage.answers(FOUND, COVERS, NOTES)
    assert found == [
        Answer(FOUND[0], Status.COVERED, ("one", "two")),
        Answer(FOUND[1], Status.APPROXIMATED, ("one",), "smaller"),
        Answer(FOUND[2], Status.MISSING, (), "no code"),
        Answer(FOUND[3], Status.COVERED, ("transformers",)),
    ]
    assert [(t.section, t.systems, t.covered, t.approximated, t.missing) for t in coverage.totals(found)] == [
        ("2.1 First", 2, 1, 1, 0),
        ("2.2 Second", 1, 0, 0, 1),
        ("PEFT", 1, 1, 0, 0),
    ]
    assert coverage.totals(found, "branch")[0] == coverage.Total("pruning", 3, 1, 1, 1)
    assert coverage.problems(FOUND, COVERS, ["transformers"], NOTES) == []


def test_a_method_may_stand_for_a_part_of_a_system() -> None:
    notes = Notes(NOTES.engines, NOTES.approximated | {"pruning/a": ("two", "half of it")}, {}, NOTES.defaults)
    assert coverage.answers(FOUND, COVERS, notes)[0] == Answer(FOUND[0], Status.APPROXIMATED, ("one", "two"), "half of it")
    assert coverage.problems(FOUND, COVERS, ["transformers"], notes) == []


@pytest.mark.parametrize(
    ("covers", "notes", "fault"),
    [
        ({"one": ("pruning/z",)}, Notes(defaults={"pruning": "x", "peft": "x"}), "method 'one' covers 'pruning/z', which is no system"),
        (COVERS, Notes(missing={"pruning/z": "x"}), "'pruning/z' is noted, but is no system"),
        (COVERS, Notes(missing={"pruning/a": "x"}), "'pruning/a' is noted as not covered, but a method covers it"),
        (
            COVERS | {"three": ()},
            Notes(approximated={"pruning/a": ("three", "x")}),
            "'pruning/a' is noted as not covered, but a method covers it",
        ),
        (COVERS, Notes(approximated={"pruning/b": ("two", "x")}, missing={"pruning/b": "x"}), "'pruning/b' has two answers"),
        (COVERS, Notes(approximated={"pruning/b": ("tow", "x")}), "'pruning/b' is approximated by 'tow'; did you mean 'two'?"),
        (COVERS, Notes(approximated={"pruning/b": ("smollm-135m", "x")}), "'pruning/b' is approximated by 'smollm-135m'"),
        (COVERS, Notes(engines={"pruning/b": ("trnsformers",)}), "'trnsformers' is no engine; did you mean 'transformers'?"),
        (COVERS, Notes(models={"pruning/b": ("smollm-135m",)}), "'smollm-135m' is no model; did you mean 'smollm2-135m'?"),
        (COVERS, Notes(models={"pruning/z": ("smollm2-135m",)}), "'pruning/z' is noted, but is no system"),
        (COVERS, Notes(defaults={"2.3": "x"}), "a reason is given for '2.3', which is no section"),
        (COVERS, Notes(defaults={"2.1": "x", "peft": "x"}), "'pruning/c' has no answer"),
    ],
)
def test_contradictions_are_found(covers: dict[str, tuple[str, ...]], notes: Notes, fault: str) -> None:
    assert any(line.startswith(fault) for line in coverage.problems(FOUND, covers, ["transformers"], notes, ["smollm2-135m"]))


def test_a_section_is_a_branch_or_a_number() -> None:
    assert {row.system.branch for row in coverage.table("pruning")} == {"pruning"}
    assert {row.system.section for row in coverage.table("1.5")} == {"1.5 KV-cache compression"}
    with pytest.raises(ConfigError, match="did you mean 'pruning'"):
        coverage.table("prunning")


def test_the_command_prints_the_same_rows_in_every_format() -> None:
    rows = json.loads(slimbench("methods", "coverage", "--section", "1.3", "--format", "json").stdout)
    assert [row["id"] for row in rows] == [row.system.id for row in coverage.table("1.3")]
    assert set(rows[0]) == {"id", "section", "system", "year", "origin", "status", "methods", "how"}
    comma = list(csv.DictReader(io.StringIO(slimbench("methods", "coverage", "--section", "1.3", "--format", "csv").stdout)))
    assert [(row["id"], row["status"]) for row in comma] == [(row["id"], row["status"]) for row in rows]
    marked = slimbench("methods", "coverage", "--section", "1.3", "--format", "md").stdout
    assert all(f"| {row['id']} |" in marked for row in rows) and f"| all | {len(rows)} |" in marked
    open_ = json.loads(slimbench("methods", "coverage", "--missing", "--format", "json").stdout)
    assert {row["status"] for row in open_} == {"missing"} and len(open_) < 329
    assert "| quantization | 86 |" in slimbench("methods", "coverage", "--summary", "--format", "md").stdout


def test_a_model_covers_a_system() -> None:
    said = Notes(models={"pruning/b": ("smollm2-135m",)}, defaults=NOTES.defaults)
    answer = next(a for a in coverage.answers(FOUND, {}, said) if a.system.id == "pruning/b")
    assert (answer.status, answer.methods) == (coverage.Status.COVERED, ("smollm2-135m",))
    assert not any("'pruning/b'" in line for line in coverage.problems(FOUND, {}, ["transformers"], said, ["smollm2-135m"]))


@pytest.mark.parametrize("name", ["transformers", "smollm2-135m"])
def test_an_engine_or_a_model_comes_near_a_system(name: str) -> None:
    said = Notes(approximated={"pruning/b": (name, "a part")}, defaults=NOTES.defaults)
    answer = next(a for a in coverage.answers(FOUND, {}, said) if a.system.id == "pruning/b")
    assert (answer.status, answer.methods, answer.how) == (coverage.Status.APPROXIMATED, (name,), "a part")
    assert not any("'pruning/b'" in line for line in coverage.problems(FOUND, {}, ["transformers"], said, ["smollm2-135m"]))
