"""A stage that waits for its turn, through the runner."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from slimbench.harness.run.cell import Cell
from slimbench.harness.run.runner import Runner
from slimbench.harness.run.turns import Place, turn
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.record import Record
from tests.support.running import Listener, cell

_WAIT_S = 3.0


def test_waiting_is_told_and_is_no_time_of_the_stage(
    runner: Runner, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIMBENCH_TURNS", str(tmp_path / "turns"))
    other = ExitStack()

    class Releasing(Listener):
        """Ends the turn of another some seconds after the runner said that it waits."""

        def stage_event(self, cell: Cell, stage: Stage, event: dict[str, object]) -> None:
            super().stage_event(cell, stage, event)
            if event.get("name") == "wait for the machine":
                threading.Timer(_WAIT_S, other.close).start()

    runner.listener = listener = Releasing()
    this = cell(overrides, "stages=[]")
    runner.attempt(this, Stage.COMPRESS)  # starts the worker, which may take longer than the wait
    assert "wait for the machine" not in listener.phases
    other.enter_context(turn([Place("machine", alone=True)], 1))
    runner.since, began = "", time.monotonic()
    again = cell(overrides, "stages=[]", "method=rtn-8bit")
    record = runner.attempt(again, Stage.COMPRESS)
    assert isinstance(record, Record) and record.status is Status.OK and record.wall_seconds
    assert listener.phases.count("wait for the machine") == 1
    assert time.monotonic() - began - record.wall_seconds > _WAIT_S - 0.5
