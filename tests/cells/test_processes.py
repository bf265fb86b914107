"""A stage of several processes: each measures its share of every point, in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

from slimbench.harness.run.cell import Cell
from slimbench.harness.run.runner import Runner
from slimbench.harness.schema.identity import Stage, Status
from slimbench.leaderboard.rows.rows import rows
from slimbench.util.files import cache_dir
from tests.support import watched
from tests.support.running import Listener, cell

SPEED = [
    "engine._target_=tests.support.watched.Watched",
    "speed.processes=3",
    "speed.max_repeats=6",
    "speed.grid=[{batch: [1, 2], prompt: 8, new_tokens: 4}]",
]


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Names the processes in which a model was loaded."""
    monkeypatch.setenv(watched.VARIABLE, str(tmp_path / "log"))
    monkeypatch.setenv(watched.PASS_S, "0")
    return tmp_path / "log.processes"


@pytest.fixture
def own(runner: Runner, opened: Path) -> Any:
    """A runner whose worker starts after the log is named."""
    made = Runner(runner.store, Listener())
    yield made
    made.close()


def test_each_process_has_its_share_and_the_interval_holds_their_spread(own: Runner, overrides: list[str], opened: Path) -> None:
    mine = cell(overrides, *SPEED)
    assert own.attempt(mine, Stage.COMPRESS).status is Status.OK  # type: ignore[union-attr]
    record = own.attempt(mine, Stage.SPEED)
    assert record and record.speed, record and record.failure
    pids = opened.read_text().split()
    assert len(pids) == len(set(pids)) == 3, "a process for each share"
    for point in record.speed.points:
        assert point.processes == [2, 2, 2] and len(point.candidate.decode_ms) == len(point.reference.decode_ms) == 6  # type: ignore[union-attr]
    assert [phase for phase in own.listener.phases if phase.startswith("speed 2×8+4")] == [  # type: ignore[attr-defined]
        f"speed 2×8+4, process {n} of 3" for n in (1, *(1, 2), *(1, 2, 3))
    ]
    assert not [flag for flag in record.speed.flags if "interruption" in flag] and not list((cache_dir() / "partial").glob("speed-*"))
    (row,) = rows([record])
    assert row.decode_low and row.decode_tokens_per_s and row.decode_high and row.decode_low < row.decode_tokens_per_s < row.decode_high


class KillsIn(Listener):
    """Kills the stage's process as it begins a phase, once."""

    def __init__(self, phase: str) -> None:
        super().__init__()
        self.phase, self.runner = phase, None

    def stage_event(self, cell: Cell, stage: Stage, event: dict[str, Any]) -> None:
        super().stage_event(cell, stage, event)
        if event.get("name") == self.phase:
            self.phase = ""
            (worker,) = self.runner._workers.values()  # type: ignore[attr-defined]
            psutil.Process(worker._server.pid).children()[0].kill()


def test_killed_in_its_second_process_it_goes_on_there(own: Runner, overrides: list[str], opened: Path) -> None:
    mine, own.listener = cell(overrides, *SPEED), KillsIn("speed 2×8+4, process 2 of 3")
    own.listener.runner = own
    assert own.attempt(mine, Stage.COMPRESS).status is Status.OK  # type: ignore[union-attr]
    assert own.attempt(mine, Stage.SPEED).status is Status.TRANSIENT  # type: ignore[union-attr]
    record = own.attempt(mine, Stage.SPEED)
    assert record and record.speed, record and record.failure
    assert [point.processes for point in record.speed.points] == [[2, 2, 2]] * 2
    assert len(opened.read_text().split()) == 4, "the process that was killed, and no other, began again"
    (flag,) = (flag for flag in record.speed.flags if "went on after an interruption" in flag)
    assert "1 of 6 points were there before" in flag
