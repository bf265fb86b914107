"""A share of a plan file, run where it is asked for. Stages are stood in for by records."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from slimbench.harness.cli.worker import worker
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.launch import drain as drains
from slimbench.harness.launch.drain import drain
from slimbench.harness.run.planning import plan as plans
from slimbench.harness.run.planning.ledger import State
from slimbench.harness.run.planning.plan import Plan, make_plan
from slimbench.harness.schema.identity import Reason, Stage, Status
from slimbench.harness.store.store import Store
from tests.support.running import cell
from tests.unit.launch.test_local import measured_only, rehearsal

NOWHERE = Console(file=io.StringIO())


@pytest.fixture
def path(overrides: list[str], tmp_path: Path) -> Path:
    mine = [*overrides, "launcher=slurm-cpu", f"results={tmp_path}"]
    return plans.write(measured_only(make_plan([cell(mine, f"method={name}") for name in ("rtn-4bit", "rtn-8bit")])), tmp_path)


def named(plan: Plan, pipeline: str, stage: Stage) -> str:
    return next(task.name for task in plan.tasks if task.stage is stage and plan.cells[task.cell].identity.pipeline == pipeline)


def test_a_task_is_run_after_what_it_stands_on_and_nothing_else_is(path: Path) -> None:
    plan, runner, done = plans.read(path), rehearsal(), []
    names = [named(plan, "rtn-8bit", Stage.SPEED)]
    ledger = drain(path, names, NOWHERE, on_done=lambda cell: done.append(cell.identity.pipeline), runner=runner)
    assert [(name, stage) for name, stage, *_ in runner.log] == [("dense", Stage.SPEED), ("rtn-8bit", Stage.SPEED)]
    assert {task.name for task in ledger.plan.tasks} == drains.with_predecessors(plan, names) and not list(ledger.open())
    assert done == [], "its quality is still to be measured"
    again = rehearsal()
    drain(path, None, NOWHERE, on_done=lambda cell: done.append(cell.identity.pipeline), runner=again)
    assert [(name, stage) for name, stage, *_ in again.log] == [
        ("dense", Stage.QUALITY),
        *[("rtn-4bit", stage) for stage in (Stage.QUALITY, Stage.SPEED)],
        ("rtn-8bit", Stage.QUALITY),
    ]
    assert sorted(done) == ["rtn-4bit", "rtn-8bit"]


def test_two_that_drain_one_plan_share_its_tasks(path: Path) -> None:
    both, logs = threading.Barrier(2, timeout=20), []

    def meet(cell: Any, stage: Stage, card: object) -> None:
        if cell.identity.pipeline == "dense":
            both.wait()

    runners = [rehearsal(meet) for _ in range(2)]
    threads = [threading.Thread(target=drain, args=(path, None, NOWHERE), kwargs={"runner": runner}) for runner in runners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    logs = [(name, stage) for runner in runners for name, stage, *_ in runner.log]
    assert len(logs) == len(set(logs)) == 6 and all(runner.log for runner in runners)


def test_a_record_of_any_node_ends_a_task_of_a_cluster_and_not_one_of_this_machine(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimbench.harness.launch import sweep
    from slimbench.harness.run import cell as cells
    from tests.unit.launch.test_local import Rehearsal

    mine = [*overrides, "method=dense", f"results={tmp_path}"]
    elsewhere, here = (sweep.plan([*mine, *more], several=False) for more in (["launcher=slurm-cpu"], []))
    assert [task.name for task in elsewhere.tasks] == [task.name for task in here.tasks], "a launcher is no part of a key"
    path = plans.write(measured_only(elsewhere), tmp_path)
    from dataclasses import replace

    own = cells.hardware()
    with monkeypatch.context() as node:
        node.setattr(cells, "hardware", lambda: replace(own, cpu="the processor of a node"))
        assert not list(drain(path, None, NOWHERE, runner=rehearsal()).open())
    from slimbench.harness.run.planning.ledger import Ledger

    assert Ledger(measured_only(elsewhere), Store(tmp_path)).counts()[State.OPEN] == 0
    assert Ledger(measured_only(here), Store(tmp_path)).counts()[State.OPEN] == 2
    assert issubclass(rehearsal(), Rehearsal)


def test_a_job_that_was_to_have_a_card_and_has_none_fails_by_the_machine(overrides: list[str], tmp_path: Path) -> None:
    mine = [*(o for o in overrides if not o.startswith("device")), "launcher=slurm", "limits.retries=0", "stages=[]", f"results={tmp_path}"]
    path = plans.write(make_plan([cell(mine, "method=dense")]), tmp_path)
    ledger = drain(path, None, NOWHERE)
    (record,) = Store(tmp_path).scan()[0]
    assert record.status is Status.TRANSIENT and record.failure and record.failure.reason is Reason.CARD
    assert "a CUDA card was asked for" in record.failure.message and ledger.counts()[State.TRANSIENT] == 1


def test_names_by_pattern(path: Path) -> None:
    plan = plans.read(path)
    assert drains.matching(plan, "speed-*") == {task.name for task in plan.tasks if task.stage is Stage.SPEED}
    with pytest.raises(ConfigError, match="no task of the plan is called 'sped"):
        drains.matching(plan, "sped-*")


def test_a_worker_that_may_call_no_host_says_at_once_what_is_missing(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = cell(overrides, "suite.corpus=hf:no/such:plain:test:text", f"results={tmp_path}")
    path = plans.write(make_plan([lacking]), tmp_path)
    monkeypatch.setenv("SLIMBENCH_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"SLIMBENCH_OFFLINE is set, and the cache lacks .*no/such"):
        worker(path)
    assert not list(tmp_path.glob("*/*/*.json"))


def test_a_plan_of_other_versions_is_not_run(path: Path) -> None:
    text = path.read_text()
    plan = plans.read(path)
    path.write_text(text.replace(plan.cells[0].identity.keys.speed, "0" * 16))
    with pytest.raises(ConfigError, match="has other keys here than in the plan"):
        drain(path, None, NOWHERE, runner=rehearsal())
