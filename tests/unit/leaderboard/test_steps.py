"""What a row says of its steps: the grid of their settings, and names that still mean those settings."""

from __future__ import annotations

import json
from typing import Any

import pytest

from slimbench.harness.config.compose import resolve
from slimbench.harness.config.registry import entries, entry
from slimbench.harness.run.cell import make_cell
from slimbench.harness.schema.identity import CellIdentity
from slimbench.harness.schema.record import Record
from slimbench.leaderboard.exchange import parquet
from slimbench.leaderboard.rows import steps
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.site.board import Board
from slimbench.leaderboard.site.method import users
from slimbench.leaderboard.tables import writers
from slimbench.leaderboard.tables.latex import to_latex
from slimbench.methods.core.grids import uniform_grid
from tests.support.board_records import Spec, records

OLD = {"bits": 4, "group_size": 64, "act_order": True, "dampening": 0.01, "block_size": 128}
"""Settings of GPTQ as a record of the time had them that knew no observer: its range went to the largest weight."""


def step(name: str, method: str, **settings: Any) -> dict[str, Any]:
    return {"name": name, "method": method, "version": 1, "settings": settings}


def cell(pipeline: str, *found: dict[str, Any]) -> CellIdentity:
    return records(Spec())[0].cell.model_copy(update={"pipeline": pipeline, "steps": list(found)})


@pytest.mark.parametrize(
    ("recorded", "settings", "shown"),
    [
        ("gptq", {}, "gptq-minmax"),
        ("gptq", {"observer": None, "asymmetric": None}, "gptq-minmax"),
        ("gptq", {"observer": "mse"}, "gptq"),
        ("gptq(bits=3)", {"bits": 3, "observer": None}, "gptq-minmax(bits=3)"),
        ("gptq(bits=3,group_size=32)", {"bits": 3, "group_size": 32}, "gptq-minmax(bits=3,group_size=32)"),
        ("gptq(bits=8)", {"bits": 8}, "gptq-minmax(bits=8)"),
        ("gptq(bits=3)", {"bits": 3, "observer": "mse"}, "gptq(bits=3)"),
        ("gptq(observer=None)", {"observer": None}, "gptq(observer=None)"),
        ("gptq(unknown=1)", {"unknown": 1}, "gptq(unknown=1)"),
    ],
)
def test_a_name_that_means_other_settings_now_gives_way_to_the_nearest_that_does_not(
    recorded: str, settings: dict[str, Any], shown: str
) -> None:
    found = cell(recorded, step("gptq", "gptq", **OLD | settings))
    assert steps.label(found) == shown and steps.names(found) == [shown.partition("(")[0]]


def test_of_a_pipeline_each_step_is_named_and_what_is_not_known_stays_as_it_was() -> None:
    pruned, old = step("sparsegpt", "sparsegpt", sparsity=0.5, pattern=None, dampening=0.01, block_size=128), step("gptq", "gptq", **OLD)
    assert steps.label(cell("sparsegpt+gptq", pruned, old)) == "sparsegpt+gptq-minmax"
    assert steps.label(cell("theirs", step("theirs", "theirs", bits=3))) == "theirs"
    assert steps.label(cell("gptq", step("gptq", "another", **OLD))) == "gptq", "a method of the user's own under that name"
    assert steps.label(cell("gptq", {"name": "gptq", "settings": OLD})) == "gptq", "no method is guessed"
    assert steps.label(cell("imported by hand", step("gptq", "gptq", **OLD))) == "gptq-minmax"
    assert steps.label(cell("a+b", step("gptq", "gptq", **OLD))) == "a+b"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("slimbench run method=gptq suite=quick", "slimbench run method=gptq-minmax suite=quick"),
        ("slimbench run 'method=[sparsegpt-2of4,gptq]' x=gptq", "slimbench run 'method=[sparsegpt-2of4,gptq-minmax]' x=gptq"),
        ("slimbench run method=gptq method.gptq.bits=3", "slimbench run method=gptq-minmax method.gptq-minmax.bits=3"),
        ("slimbench run experiment=calibration_seeds", "slimbench run experiment=calibration_seeds method=gptq-minmax"),
    ],
)
def test_the_command_of_a_row_makes_what_was_measured(text: str, shown: str) -> None:
    old = step("gptq", "gptq", **OLD)
    before = [step("sparsegpt-2of4", "sparsegpt", **entry("sparsegpt-2of4").settings)] if "[" in text else []
    pipeline = "+".join([*(part["name"] for part in before), "gptq"])
    assert steps.command(text, cell(pipeline, *before, old)) == shown
    assert steps.command(text, cell(pipeline, *before, step("gptq", "gptq", **OLD | {"observer": "mse"}))) == text


def test_committed_records_are_shown_as_the_variant_that_they_are_and_keep_key_and_settings(
    committed_rows: list[Row], committed: list[Record]
) -> None:
    recorded = {record.cell.pipeline for record in committed}
    renamed = {row.pipeline for row in committed_rows} - recorded
    of_gptq = {name.replace("gptq", "gptq-minmax") for name in recorded if name == "gptq" or name.startswith("gptq(")}
    assert renamed == (of_gptq | {"owq-group64", "vptq-plain"}) - recorded
    assert "gptq-minmax" in {row.pipeline for row in committed_rows}
    assert {"gptq-minmax(bits=2)", "gptq-minmax(bits=3,group_size=32)", "gptq-minmax(group_size=32)"} <= renamed
    (row,) = (row for row in committed_rows if (row.pipeline, row.calibration_seed, row.suite) == ("gptq-minmax", 2, "quick"))
    config = resolve(["calibration_samples=32", "calibration_length=256", "calibration_seed=2", "method=gptq-minmax"])
    assert make_cell(config).identity.keys.compress == row.keys.compress, "the name makes that very artefact"
    pages = users(Board.of(committed))
    assert len(pages["gptq-minmax"]) >= 11 and {row.grid for row in pages["gptq"]} == {"symmetric, searched"}


def test_every_committed_row_says_its_grid_and_the_evidence_bears_it_out(committed_rows: list[Row]) -> None:
    """Bits of the loaded layers tell offsets: 16 more for each group of weights that the method claims."""
    told = {row.pipeline: row.grid for row in committed_rows}
    assert all(row.grid for row in committed_rows if row.family == "quantization" and not row.pipeline.startswith("kv-"))
    assert {row.grid for row in committed_rows if row.is_reference or row.family == "pruning"} == {None}
    known = [row for row in committed_rows if row.effective_bits is not None and told[row.pipeline] is not None]
    at_64 = {row.pipeline: row.effective_bits for row in known}
    for name, bits in {"gptq-minmax": 4.25, "gptaq": 4.25, "signround": 4.25, "rtn-4bit": 4.25, "awq": 4.5, "hqq": 4.5}.items():
        assert at_64[name] == pytest.approx(bits, abs=1e-6) and (told[name] or "").startswith(
            "symmetric" if bits == 4.25 else "with offsets"
        )
    assert told["gptq-minmax"] == uniform_grid(True, "min-max") and told["gptq-3bit"] == uniform_grid(True, "searched")
    assert (told["nf4"], told["fp8"], told["dense"]) == ("codebook", "float", None)


def test_a_row_takes_the_grid_from_its_record_and_that_of_the_last_step_that_has_one() -> None:
    method = make_cell(resolve(["method=awq-sym-mse"])).identity
    assert method.steps[0]["grid"] == steps.grid(method) == uniform_grid(True, "searched")
    assert steps.grid(cell("mine", step("mine", "mine") | {"grid": "powers of two"})) == "powers of two"
    assert steps.grid(cell("mine", step("mine", "mine"))) is None
    policy = make_cell(resolve(["method=[rtn-4bit-asym,kv-int8]"])).identity
    assert steps.grid(policy) == uniform_grid(False, "min-max")
    assert "grid" not in make_cell(resolve(["method=dense"])).identity.steps[0]


def test_a_method_says_the_same_to_its_record_and_to_a_board_that_has_only_its_settings() -> None:
    for known in entries():
        identity = cell(known.name, step(known.name, known.method.name, **known.settings))
        assert steps.grid(identity) == known.method.weight_grid, known.name


def test_the_grid_stands_in_every_rendering_and_export() -> None:
    made = records(Spec("gptq", "quantization", loss=1.3, bits=4.25))
    for record in made:
        record.cell.steps = [step("gptq", "gptq", **OLD) | {"grid": "odd | grid & <b>"}]
    board = rows(records(Spec()) + made)
    (row,) = (row for row in board if not row.is_reference)
    assert row.grid == "odd | grid & <b>" and row.pipeline == "gptq-minmax"
    markdown = writers.to_markdown(board)
    assert "| Grid |" in markdown and r"odd \| grid \& \<b\>" in markdown
    assert len({line.replace(r"\|", "").count("|") for line in markdown.splitlines() if line.startswith("|")}) == 1
    assert r"odd \textbar{} grid \& \textless{}b\textgreater{}" in to_latex(board)
    assert json.loads(writers.to_json(board))[1]["grid"] == row.grid and row.grid in writers.to_csv(board)
    assert b"odd | grid" in parquet.of_rows(board)
