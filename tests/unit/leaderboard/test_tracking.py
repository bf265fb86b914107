"""W&B: what was logged offline is read back from disk and holds the numbers of the records."""

from __future__ import annotations

import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slimbench.harness.schema.record import Record
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.tracking import dashboard
from slimbench.leaderboard.tracking import wandb as tracking
from slimbench.util.compat.wandb_workspaces import definition
from tests.support import wandb_file
from tests.support.board_records import Spec, records

SPECS = [Spec(), Spec("four", "quantization", loss=1.2, decode_ms=25, bits=4.25, size=0.4, flags=("a slower kernel ran: none",))]


@pytest.fixture(scope="module")
def measured() -> list[Record]:
    return [record for spec in SPECS for record in records(spec)]


@pytest.fixture(scope="module")
def folder(measured: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("wandb")
    written, online = tracking.log(measured, "slimbench-test", found, mode="offline")
    assert len(written) == len(SPECS) and not online
    return found


def test_offline_runs_hold_the_numbers_of_the_records(measured: list[Record], folder: Path) -> None:
    logged = {run["config"]["pipeline"]: run for run in map(wandb_file.read, tracking.offline_runs(folder))}
    assert set(logged) == {"dense", "four"}
    for row in rows(measured):
        run = logged[row.pipeline]
        summary = run["summary"]
        assert run["group"] == f"{row.model} · {row.family}" and run["project"] == "slimbench-test" and row.engine in run["tags"]
        for name in ("perplexity", "perplexity_low", "accuracy", "decode_tokens_per_s", "weight_bytes", "disk_bytes", "effective_bits"):
            assert summary[name] == getattr(row, name), name
        assert run["config"]["keys"] == row.keys.model_dump()
        assert run["config"]["provenance"]["packages"]["torch"] == "2.13.0"


def test_tables_and_artefact_are_those_of_the_records(measured: list[Record], folder: Path) -> None:
    run = next(r for r in map(wandb_file.read, tracking.offline_runs(folder)) if r["config"]["pipeline"] == "four")
    row = next(row for row in rows(measured) if row.pipeline == "four")
    assert {task: accuracy for task, accuracy, _ in run["tables"]["tasks"]["data"]} == row.task_accuracy
    grid = run["tables"]["speed_grid"]
    assert [dict(zip(grid["columns"], line, strict=True)) for line in grid["data"]] == row.speed_points
    made = next(r for r in measured if r.cell.pipeline == "four" and r.compress)
    assert made.compress and run["artefacts"][0]["disk_bytes"] == made.compress.disk_bytes
    assert run["artefacts"][0]["claim"]["bits"] == made.compress.claim.bits


def test_the_host_is_not_named(folder: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    for path in folder.rglob("run-*.wandb"):
        for payload in wandb_file.payloads(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(payload)
            assert record.run.host != socket.gethostname()


def test_what_has_not_changed_is_not_logged_again(measured: list[Record], folder: Path) -> None:
    assert tracking.log(measured, "slimbench-test", folder, mode="offline")[0] == []
    changed = [*measured, *records(Spec("three", "quantization", loss=2.0, bits=3.25))]
    assert [run.name for run in tracking.log(changed, "slimbench-test", folder, mode="offline")[0]] == ["three · transformers"]


def test_dashboard_shows_metrics_that_the_runs_have() -> None:
    pytest.importorskip("wandb_workspaces")
    text = json.dumps(definition(dashboard.workspace("team", "slimbench")))
    named = set(re.findall(r'summary:([a-z_]+)|"metrics": \["([a-z_]+)"', text))
    named = {name for pair in named for name in pair if name}
    assert {"weight_bytes", "perplexity", "kl_mean", "speedup", "compress_seconds", "accuracy"} <= named <= set(Row.model_fields)


def test_several_nodes_note_what_they_logged_and_a_torn_note_is_none(tmp_path: Path) -> None:
    state = tmp_path / "wandb" / "state.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: tracking._note(state, f"place/{number}", "digest"), range(40)))
    assert tracking._logged(state) == {f"place/{number}": "digest" for number in range(40)}
    assert [path.name for path in state.parent.iterdir()] == [state.name]
    state.write_text(state.read_text()[:99])
    assert tracking._logged(state) == {}
    tracking._note(state, "place", "digest")
    assert tracking._logged(state) == {"place": "digest"}
