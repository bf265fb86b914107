"""The board of the committed records holds what a program that shares no code with it computes from their raw samples."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slimbench.harness.schema.generation import TimedTokens
from slimbench.harness.store.store import Store
from slimbench.leaderboard.rows.results.speed import speed
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.tables.writers import to_json
from tests.bench import recompute
from tests.support.board_records import Spec, board, records, write
from tests.support.paths import ROOT
from tests.unit.cli.test_cli import slimbench
from tests.unit.leaderboard.test_retrieval import caches

SCRIPT = Path(recompute.__file__)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows that `board build` exports."""
    folder = tmp_path_factory.mktemp("built") / "board"
    built = slimbench("board", "build", "--results", str(ROOT / "results"), "--out", str(folder), "--no-figures")
    assert built.returncode == 0, built.stderr
    return folder / "table.json"


def run(table: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-I", str(SCRIPT), str(ROOT / "results"), str(table)], capture_output=True, text=True)


def test_it_reads_json_and_shares_no_code() -> None:
    named = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(SCRIPT.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    assert named - set(sys.stdlib_module_names) == {"numpy", "scipy"}


def test_every_figure_of_the_board_is_that_of_the_raw_samples(table: Path) -> None:
    rows = json.loads(table.read_text())
    assert all(any(row[column] not in (None, {}, []) for row in rows) for column in recompute.COMPARED), "nothing is compared in vain"
    done = run(table)
    assert done.returncode == 0, done.stdout
    measured = [row for row in rows if row["perplexity"] is not None or row["decode_tokens_per_s"] is not None]
    assert done.stdout.startswith(f"{len(rows)} rows, ") and int(done.stdout.split()[2]) > 42 * len(measured) > 13_920


def test_figures_of_several_processes_are_those_of_the_raw_samples_too() -> None:
    results = [record.speed for record in board() if record.speed]
    for result in results:
        result.points[0].processes = [7, 8, 6]
        shown, again = speed(result).model_dump(), recompute.timing(result.model_dump(mode="json"))
        names = again.keys() - {"speed_points", "timed_equal", "roofline_fraction"}  # that of these records is made up
        assert names >= {"prefill_low", "decode_tokens_per_s", "decode_high", "speedup", "speedup_low"}
        assert {name: shown[name] for name in names} == pytest.approx({name: again[name] for name in names}, rel=1e-9)
    assert len(results) > 5


def test_facts_of_long_contexts_are_those_of_the_raw_answers_too() -> None:
    made = rows(caches())
    found = {record.cell.pipeline: record.quality.model_dump(mode="json") for record in caches() if record.quality}
    dense = next(row for row in made if row.is_reference)
    for row in made:
        reasons = [context["reason"] for context in row.contexts]
        again = recompute.facts(found[row.pipeline], None if row is dense else found[dense.pipeline], reasons)["contexts"]
        assert len(again) == len(row.contexts) == 2
        for shown, ours in zip(row.contexts, again, strict=True):
            known = {name: value for name, value in shown.items() if value is not None}
            assert known == pytest.approx({name: value for name, value in ours.items() if value is not None}, rel=1e-9)
    assert sum("score_low" in line for line in again) == 2


def test_figures_of_continuations_are_those_of_the_raw_samples_too(tmp_path: Path) -> None:
    dense, gptq = records(Spec()), records(Spec("gptq", "quantization", loss=1.3))
    write(dense, [[7, 8, 9, n] for n in range(10)])
    write(gptq, [[7, 8, n % 4, 3] for n in range(10)])
    for record in dense:
        if record.quality and record.quality.generation:
            record.quality.generation.ties = [[n % 3] for n in range(10)]
    gptq[2].speed.points[0].tokens = TimedTokens(candidate={"a": 21}, reference={"b": 21}, equal=0.8125)  # type: ignore[union-attr]
    for record in dense + gptq:
        Store(tmp_path).put(record)
    table, told = json.loads(to_json(rows(dense + gptq))), list[str]()
    (row,) = (row for row in table if row["pipeline"] == "gptq")
    assert all(row[name] not in (None, {}) for name in recompute.WRITTEN)
    raw = recompute.Records(tmp_path)
    shown = recompute.figures(row, raw)
    for name in recompute.WRITTEN:
        assert all(recompute.deviation(a, b) <= 1e-9 for _, a, b in recompute.pairs(name, shown[name], row[name])), name
    row["divergent_low"] *= 1 + 1e-8
    recompute.compare(table, raw, told.append)
    assert any(": divergent_low is " in line for line in told)


def nudged(name: str, by: float) -> Callable[[list[dict[str, Any]]], None]:
    def change(rows: list[dict[str, Any]]) -> None:
        row = next(row for row in rows if row[name])
        row[name] *= 1 + by

    return change


def _without_a_bound(rows: list[dict[str, Any]]) -> None:
    next(row for row in rows if row["kl_low"] is not None)["kl_low"] = None


def _another_flip(rows: list[dict[str, Any]]) -> None:
    next(row for row in rows if row["flips_to_wrong"])["flips_to_wrong"] += 1


def _one_point_faster(rows: list[dict[str, Any]]) -> None:
    next(row for row in rows if row["decode_low"])["speed_points"][0]["decode_low"] *= 1 + 1e-8


FALSE: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "no row": (lambda rows: rows.pop(3), "no row of "),
    "perplexity": (nudged("perplexity", 1e-8), ": perplexity is "),
    "p": (nudged("perplexity_p", 1e-8), ": perplexity_p is "),
    "speed-up": (nudged("speedup", -1e-8), ": speedup is "),
    "no bound": (_without_a_bound, ": kl_low is "),
    "flip": (_another_flip, ": flips_to_wrong is "),
    "point": (_one_point_faster, ": speed_points[0].decode_low is "),
}


def test_a_figure_that_is_off_by_a_hundred_millionth_is_told(table: Path, tmp_path: Path) -> None:
    """Each of them, beside the others, and nothing else."""
    rows = json.loads(table.read_text())
    for change, _ in FALSE.values():
        change(rows)
    (tmp_path / "table.json").write_text(json.dumps(rows))
    done = run(tmp_path / "table.json")
    *lines, last = done.stdout.splitlines()
    assert done.returncode == 1 and len(lines) == len(FALSE) and last.endswith(f"{len(FALSE)} differ"), done.stdout
    assert all(sum(told in line for line in lines) == 1 for _, told in FALSE.values()), done.stdout
