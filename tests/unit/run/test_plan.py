"""A plan is data: frozen cells, tasks in order, written and read again; what it has come to is told by the store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.launch import sweep
from slimbench.harness.run import hub
from slimbench.harness.run.planning import plan as plans
from slimbench.harness.run.planning.ledger import Ledger, State
from slimbench.harness.run.planning.outlook import outlook
from slimbench.harness.run.planning.plan import Plan, make_plan
from slimbench.harness.run.runner import Runner
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.store.store import Store
from tests.support.running import cell, run


def stages(plan: Plan) -> list[tuple[str, Stage]]:
    return [(plan.cells[task.cell].identity.pipeline, task.stage) for task in plan.tasks]


def test_a_reference_is_planned_once_and_before_what_is_compared_with_it(overrides: list[str]) -> None:
    plan = make_plan([cell(overrides, f"method={name}") for name in ("rtn-4bit", "dense", "rtn-8bit")])
    assert stages(plan) == [(name, stage) for name in ("dense", "rtn-4bit", "rtn-8bit") for stage in Stage]
    assert [planned.asked for planned in plan.cells] == [True, True, True]
    speed = next(task for task in plan.tasks if plan.cells[task.cell].identity.pipeline == "rtn-8bit" and task.stage is Stage.SPEED)
    assert [stages(plan)[[t.name for t in plan.tasks].index(name)] for name in speed.after] == [
        ("rtn-8bit", Stage.COMPRESS),
        ("dense", Stage.COMPRESS),
        ("dense", Stage.SPEED),
    ]
    assert make_plan([cell(overrides, "method=rtn-4bit")]).cells[0].asked is False


def test_cells_that_differ_in_the_engine_share_their_compression(overrides: list[str]) -> None:
    plan = make_plan([cell(overrides, f"engine={engine}") for engine in ("transformers", "compiled")])
    assert stages(plan) == [("dense", Stage.COMPRESS), *[("dense", stage) for stage in (Stage.QUALITY, Stage.SPEED)] * 2]
    assert [len(plan.of(planned)) for planned in plan.cells] == [3, 3]


def test_a_plan_that_was_written_is_the_plan_that_is_read(overrides: list[str], tmp_path: Path) -> None:
    plan = make_plan([cell(overrides, "method=rtn-4bit", f"results={tmp_path}", "device.threads=null")])
    path = plans.write(plan, tmp_path)
    assert path == tmp_path / "plans" / f"{plan.id}.json"
    again = plans.read(path)
    unplaced = {"cells": {"__all__": {"config": {"results"}}}}
    assert again.model_dump(exclude=unplaced) == plan.model_dump(exclude=unplaced) and again.id == plan.id  # type: ignore[arg-type]
    assert str(tmp_path) not in path.read_text()
    assert again.cells[1].cell.methods == plan.cells[1].cell.methods
    later = make_plan([cell(overrides, "method=rtn-4bit", "results=elsewhere", "device.threads=null")])
    assert later.id == plan.id, "the same cells, planned later and for another folder, are the same plan"
    assert make_plan([cell(overrides, "method=rtn-4bit", "suite.windows=2")]).id != plan.id


@pytest.mark.parametrize("content", ["", "{}", '{"cells": []}', "[1]"])
def test_a_file_that_is_no_plan_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ConfigError, match="is no plan of slimbench") as caught:
        plans.read(tmp_path / "x.json")
    assert "\n" not in str(caught.value)


def test_a_plan_says_what_is_recorded_and_what_would_run_and_writes_nothing(runner: Runner, overrides: list[str]) -> None:
    folder = runner.store.root
    mine = [*overrides, f"results={folder}"]
    run(runner, cell(mine, "method=rtn-8bit", "stages=[quality]"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    plan = sweep.plan([*mine, "method=rtn-8bit,rtn-4bit", "settings.group_size=32,256"], several=True)
    planned = {p.cell.identity.pipeline: p for p in outlook(Ledger(plan, runner.store))}
    fresh, refused = dict.fromkeys(Stage, "run"), {Stage.COMPRESS: "cannot run"}
    recorded = {Stage.COMPRESS: "recorded ok", Stage.QUALITY: "recorded ok", Stage.SPEED: "run"}
    assert {name: p.stages for name, p in planned.items()} == {
        "dense": recorded,
        "rtn-8bit(group_size=32)": fresh,
        "rtn-8bit(group_size=256)": refused,
        "rtn-4bit(group_size=32)": fresh,
        "rtn-4bit(group_size=256)": refused,
    }
    assert "group_size 256 does not divide" in planned["rtn-4bit(group_size=256)"].reason
    again = sweep.plan([*mine, "method=rtn-8bit", "on_existing=all"], several=True)
    assert outlook(Ledger(again, runner.store))[1].stages == fresh
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_what_a_failed_compression_leaves_is_needless_and_an_earlier_failure_is_known_as_such(
    runner: Runner,
    overrides: list[str],
) -> None:
    this = cell(overrides, "~method.dense", "+method.bad._target_=tests.support.misbehaving.Misbehaving")
    run(runner, this)
    for how, expected in (("keep", State.FAILED), ("failed", State.OPEN)):
        plan = make_plan([cell(list(this.overrides), f"on_existing={how}")])
        ledger = Ledger(plan, runner.store)
        assert ledger.state(plan.of(plan.cells[-1])[0]) is expected
    ledger = Ledger(make_plan([this]), runner.store)
    own = ledger.plan.of(ledger.plan.cells[-1])
    assert [ledger.state(task) for task in own] == [State.FAILED, State.NEEDLESS, State.NEEDLESS]
    ending = ledger.ending(own[0])
    assert ending and ending.earlier and ending.status is Status.FAILED


def test_the_ledger_of_a_written_plan_needs_no_method(overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Status and exit code come from plan and store; the class that a plan names is not even looked for."""
    path = plans.write(make_plan([cell(overrides, "method=rtn-4bit")]), tmp_path)
    content = json.loads(path.read_text())
    for planned in content["cells"]:
        planned["config"]["pipeline"][0]["target"] = "no.such.Class"
    path.write_text(json.dumps(content))
    ledger = Ledger(plans.read(path), Store(tmp_path))
    assert ledger.counts()[State.OPEN] == 6


def test_planning_reads_no_record_that_it_does_not_ask_for(overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A results folder may hold ten thousand records: those of the planned tasks are looked up by name, and nothing is listed."""
    from rich.console import Console

    from slimbench.harness.run.planning.progress import ProgressDisplay

    def refuse(*_: object) -> None:
        raise AssertionError("the folder was listed")

    monkeypatch.setattr(Store, "scan", refuse)
    monkeypatch.setattr(Store, "files", refuse)
    plan = sweep.plan([*overrides, f"results={tmp_path}", "method=rtn-4bit,rtn-8bit,nf4", "seed=0,1"], several=True)
    assert len(plan.cells) == 8
    outlook(Ledger(plan, Store(tmp_path)))
    ProgressDisplay(plan, Store(tmp_path), Console(quiet=True))


def test_a_plan_says_that_the_hub_cannot_be_reached(overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = [o for o in overrides if not o.startswith("model")]
    plan = sweep.plan([*mine, "model=opt-125m", "method=rtn-4bit", f"results={tmp_path}"], several=False)
    for reachable, word in ((False, "cannot run"), (True, "run")):
        monkeypatch.setattr(hub, "reachable", lambda reachable=reachable: reachable)
        told = outlook(Ledger(plan, Store(tmp_path)))
        assert {what for cell in told for what in cell.stages.values()} == {word}
        assert {cell.reason for cell in told} == {"" if reachable else "the hub cannot be reached for model hf:facebook/opt-125m@main"}
