"""Commands that run cells: what they end with and say, what they leave, what they log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slimbench.harness.cli.exit_codes import ExitCode
from slimbench.harness.cli.run import run
from slimbench.harness.store.store import Store
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.tracking import wandb as tracking
from tests.support import wandb_file
from tests.unit.cli.test_cli import slimbench
from tests.unit.cli.test_exit_codes import exit_code

BAD = ["~method.dense", "+method.bad._target_=tests.support.misbehaving.Misbehaving"]


def test_a_run_that_failed_says_so_then_and_later(overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = [*overrides, *BAD, f"results={tmp_path}", "stages=[]"]
    assert exit_code(run, *mine) == ExitCode.FAILED
    first = capsys.readouterr().err
    assert "library (misbehaving.py:" in first and "earlier" not in first, "the line that failed is named"
    assert exit_code(run, *mine) == ExitCode.FAILED, "what is recorded counts, although nothing ran this time"
    again = capsys.readouterr().err
    assert "failed earlier (" in again and "; on_existing=failed runs it again" in again
    shown = slimbench("show", "bad", "--results", str(tmp_path))
    assert shown.returncode == 0 and "RuntimeError: library (misbehaving.py:" in shown.stdout and "Traceback" not in shown.stdout
    assert "Traceback (most recent call last)" in slimbench("show", "bad", "--traceback", "--results", str(tmp_path)).stdout
    state = slimbench("status", str(tmp_path), "--json")
    (facts,) = json.loads(state.stdout)
    assert (facts["failed"], facts["to run"], facts["exit code"]) == (1, 0, ExitCode.FAILED) and "library" in next(
        iter(facts["failures"].values())
    )


def test_a_cell_is_logged_when_it_is_done(overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    results = tmp_path / "results"
    assert (
        exit_code(run, *overrides, f"results={results}", "method=rtn-4bit", "settings.group_size=32", "tracking=wandb", "stages=[quality]")
        == 0
    )
    logged = {run["config"]["pipeline"]: run for run in map(wandb_file.read, tracking.offline_runs(tmp_path))}
    board = {row.pipeline: row for row in rows(Store(results).scan()[0])}
    assert set(logged) == set(board) == {"dense", "rtn-4bit(group_size=32)"}
    for name, row in board.items():
        assert logged[name]["summary"]["perplexity"] == row.perplexity


def test_a_tracker_that_fails_stops_nothing(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(tracking, "log", refuse)
    assert exit_code(run, *overrides, f"results={tmp_path}", "tracking=wandb", "stages=[]") == 0
    assert "not logged to W&B: no room" in capsys.readouterr().err
