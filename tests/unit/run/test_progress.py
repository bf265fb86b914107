"""What is shown while a plan runs: estimates of each method's own time, and a sign of life where there is no terminal."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from slimbench.harness.run.planning import progress
from slimbench.harness.run.planning.estimates import Estimates
from slimbench.harness.run.planning.plan import make_plan
from slimbench.harness.run.planning.progress import ProgressDisplay
from slimbench.harness.schema.identity import Stage
from slimbench.harness.store.store import Store, dump
from tests.support.board_records import Spec, records
from tests.support.running import cell


def put(store: Store, overrides: list[str], name: str, seconds: float) -> None:
    """A record of an earlier compression by a method, under another key."""
    this = cell(overrides, f"method={name}")
    record = records(Spec())[0].model_copy(update={"cell": this.identity, "wall_seconds": seconds})
    path = store.path(this.identity, Stage.COMPRESS, this.hardware(Stage.COMPRESS)).with_name("compress-0123456789abcdef-other.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(dump(record))


def test_a_method_is_estimated_by_its_own_earlier_time(overrides: list[str], tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store, overrides, "rtn-4bit", 2.0)
    put(store, overrides, "gptq", 300.0)
    plan = make_plan([cell(overrides, f"method={name}", "suite.windows=3") for name in ("rtn-4bit", "gptq", "nf4")])
    by_name = {planned.identity.pipeline: planned for planned in plan.cells}
    estimates = Estimates(store)
    assert estimates.seconds(by_name["rtn-4bit"], Stage.COMPRESS) == 2.0
    assert estimates.seconds(by_name["gptq"], Stage.COMPRESS) == 300.0
    assert estimates.seconds(by_name["nf4"], Stage.COMPRESS) == 151.0, "nothing is known of it but its kind of stage"
    assert estimates.seconds(by_name["gptq"], Stage.QUALITY) is None
    estimates.learn(by_name["nf4"], Stage.COMPRESS, 7.0)
    assert estimates.seconds(by_name["nf4"], Stage.COMPRESS) == 7.0
    other = make_plan([cell(overrides, "method=gptq", "method.gptq.bits=3")]).cells[-1]
    assert estimates.seconds(other, Stage.COMPRESS) == 300.0, "the same method with other settings"


def test_only_folders_of_what_is_planned_are_looked_into(overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    put(store, overrides, "gptq", 300.0)
    read: list[Path] = []
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or b"{}")
    Estimates(store).seconds(make_plan([cell(overrides, "method=rtn-4bit")]).cells[-1], Stage.COMPRESS)
    assert read == []


def test_without_a_terminal_a_stage_that_runs_is_told_again_and_again(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "HEARTBEAT_S", 0.05)
    this, out = cell(overrides), io.StringIO()
    with ProgressDisplay(make_plan([this]), Store(tmp_path), Console(file=out, width=200)) as display:
        display.stage_started(this, Stage.COMPRESS)
        display.stage_event(this, Stage.COMPRESS, {"event": "phase", "name": "layer"})
        display.stage_event(this, Stage.COMPRESS, {"event": "progress", "done": 3, "total": 30})
        deadline = time.monotonic() + 20
        while out.getvalue().count("layer 3/30") < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
    lines = [line for line in out.getvalue().splitlines() if "layer 3/30" in line]
    assert len(lines) >= 2 and lines[0].lstrip().startswith("tiny · dense compress layer 3/30 0:0")


def test_a_phase_tells_what_is_left_of_it_by_its_own_pace_from_where_it_went_on(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is resumed begins in the middle; a phase that follows has a pace of its own."""
    monkeypatch.setattr(progress, "HEARTBEAT_S", 0.02)
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    this, out = cell(overrides), io.StringIO()

    def said() -> str:
        before = len(out.getvalue())
        for _ in range(4000):
            if out.getvalue()[before:].count("\n") >= 3:
                break
            time.sleep(0.005)
        return out.getvalue()[before:].splitlines()[-1]

    with ProgressDisplay(make_plan([this]), Store(tmp_path), Console(file=out, width=200)) as display:
        display.stage_started(this, Stage.COMPRESS)
        display.stage_event(this, Stage.COMPRESS, {"event": "phase", "name": "kd"})
        display.stage_event(this, Stage.COMPRESS, {"event": "progress", "done": 61, "total": 200})
        now[0] += 9.0
        display.stage_event(this, Stage.COMPRESS, {"event": "progress", "done": 64, "total": 200})
        assert "kd 64/200 0:09 · no estimate of all yet" in said(), "too early to tell"
        now[0] += 111.0
        display.stage_event(this, Stage.COMPRESS, {"event": "progress", "done": 101, "total": 200})
        assert "kd 101/200 2:00 (about 5 min left) · no estimate" in said(), "40 steps in 120 s, 99 to go"
        monkeypatch.setattr(Estimates, "seconds", lambda *_: 150.0)
        assert "(about 5 min left) · about 10 min left" in said(), (
            "297 s by the pace, not the 30 that an estimate leaves, and two stages more"
        )
        monkeypatch.setattr(Estimates, "seconds", lambda *_: 1200.0)
        assert "(about 5 min left) · about 58 min left" in said(), "what an estimate knows beyond this phase"
        display.stage_event(this, Stage.COMPRESS, {"event": "phase", "name": "write"})
        assert "write 2:00 · " in said()
