"""The local launcher: what runs, in which order, in how many slots, and how it stops. Stages are stood in for by records."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slimbench.harness.cli.exit_codes import ExitCode, of
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.schema import LauncherConfig
from slimbench.harness.launch import sweep
from slimbench.harness.launch.local import LocalLauncher
from slimbench.harness.measure import hardware as machine
from slimbench.harness.run.cell import Cell
from slimbench.harness.run.planning.ledger import Ledger, State, recorded
from slimbench.harness.run.planning.plan import Plan, make_plan
from slimbench.harness.run.runner import Runner
from slimbench.harness.run.worker import Outcome
from slimbench.harness.schema.hardware import Gpu
from slimbench.harness.schema.identity import Reason, Stage, Status
from slimbench.harness.schema.record import Failure, Record
from slimbench.harness.store import store as stores
from slimbench.harness.store.store import Store, StoreError
from tests.support.running import Listener, cell


class Rehearsal(Runner):
    """A runner whose stages end at once as `unsupported`, or as `act` says."""

    act: Callable[[Cell, Stage, int | None], Outcome | None] = staticmethod(lambda cell, stage, card: None)  # type: ignore[assignment]
    log: list[tuple[str, Stage, int | None, float, float]]

    def _outcome(self, cell: Cell, stage: Stage) -> Outcome:
        began = time.monotonic()
        outcome = self.act(cell, stage, self.card)
        self.log.append((cell.identity.pipeline, stage, self.card, began, time.monotonic()))
        return (
            outcome
            if isinstance(outcome, Outcome)
            else Outcome(Status.UNSUPPORTED, "test", 0.0, failure=Failure(type="Test", message="stood in for"))
        )


def rehearsal(act: Callable[..., Outcome | None] = lambda cell, stage, card: None) -> type[Rehearsal]:
    return type("R", (Rehearsal,), {"act": staticmethod(act), "log": []})


def measured_only(plan: Plan) -> Plan:
    """The plan without its compressions, which here never end well."""
    return plan.only({task.name for task in plan.tasks if task.stage is not Stage.COMPRESS})


def plan_of(overrides: list[str], *names: str) -> Plan:
    return measured_only(make_plan([cell(overrides, f"method={name}") for name in names]))


def in_slots(plan: Plan, slots: int) -> Plan:
    return plan.model_copy(update={"launcher": LauncherConfig(slots=slots)})


def test_each_task_runs_once_and_a_reference_before_what_is_compared_with_it(overrides: list[str], tmp_path: Path) -> None:
    plan, runner, finished = plan_of(overrides, "rtn-4bit", "rtn-8bit"), rehearsal(), []
    LocalLauncher(Listener(), on_done=lambda cell: finished.append(cell.identity.pipeline), runner=runner).launch(plan, Store(tmp_path))
    order = [(name, stage) for name, stage, *_ in runner.log]
    assert order == [(name, stage) for name in ("dense", "rtn-4bit", "rtn-8bit") for stage in (Stage.QUALITY, Stage.SPEED)]
    assert finished == ["rtn-4bit", "rtn-8bit"], "cells that were asked for, when they are done"
    again = rehearsal()
    LocalLauncher(Listener(), runner=again).launch(plan, Store(tmp_path))
    assert again.log == []


def test_each_slot_has_a_card_of_its_own_and_slots_run_at_the_same_time(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards(monkeypatch, 3)
    mine = [o for o in overrides if not o.startswith("device")]
    plan = plan_of([*mine, "device=cuda", "device.index=1"], "dense", "rtn-4bit", "rtn-8bit")
    both = threading.Barrier(2, timeout=20)
    runner = rehearsal(lambda cell, stage, card: both.wait() if cell.identity.pipeline == "dense" else None)
    LocalLauncher(Listener(), runner=runner).launch(in_slots(plan, 2), Store(tmp_path))
    assert {card for *_, card, _, _ in runner.log} == {1, 2}
    began = {(name, stage): began for name, stage, _, began, _ in runner.log}
    ended = {(name, stage): ended for name, stage, _, _, ended in runner.log}
    for name in ("rtn-4bit", "rtn-8bit"):
        for stage in (Stage.QUALITY, Stage.SPEED):
            assert began[name, stage] >= ended["dense", stage], "the other slot waits for the reference"
    with pytest.raises(ConfigError, match="3 CUDA cards"):
        LocalLauncher.check(in_slots(plan, 3))


def test_slots_of_several_cards_share_none(overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, 5)
    mine = [o for o in overrides if not o.startswith("device")]
    plan = plan_of([*mine, "device=cuda", "device.index=1", "device.cards=2"], "dense", "magnitude")
    both = threading.Barrier(2, timeout=20)
    runner = rehearsal(lambda cell, stage, card: both.wait() if stage is Stage.COMPRESS else None)
    LocalLauncher(Listener(), runner=runner).launch(in_slots(plan, 2), Store(tmp_path))
    assert {card for *_, card, _, _ in runner.log} == {1, 3}
    with pytest.raises(ConfigError, match=r"launcher.slots=3 of device.cards=2: this machine has 5 CUDA cards"):
        LocalLauncher.check(in_slots(plan, 3))


def test_slots_on_a_cpu_are_refused(overrides: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="disturb each other"):
        LocalLauncher(Listener(), runner=rehearsal()).launch(in_slots(plan_of(overrides, "dense"), 2), Store(tmp_path))
    with pytest.raises(ConfigError, match="disturb each other"):
        sweep.plan([*overrides, "launcher.slots=2", f"results={tmp_path / 'new'}"], several=False)
    assert not (tmp_path / "new").exists(), "refused before a plan is written"


def test_what_another_process_holds_is_left_to_it_while_other_work_is_there(overrides: list[str], tmp_path: Path) -> None:
    plan, store, runner = plan_of(overrides, "dense"), Store(tmp_path), rehearsal()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with store.lock(plan.cells[0].identity, Stage.QUALITY, plan.cells[0].hardware(Stage.QUALITY)) as mine:
            assert mine
            held.set()
            done.wait(20)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(20)
    threading.Timer(1.5, done.set).start()
    LocalLauncher(Listener(), runner=runner).launch(plan, store)
    other.join()
    assert [stage for _, stage, *_ in runner.log] == [Stage.SPEED, Stage.QUALITY]


def test_it_stops_at_a_stage_boundary_and_goes_on(overrides: list[str], tmp_path: Path) -> None:
    plan, runner = plan_of(overrides, "dense", "rtn-4bit"), rehearsal(lambda *_: time.sleep(0.3))
    LocalLauncher(Listener(), seconds=0.1, runner=runner).launch(plan, Store(tmp_path))
    assert len(runner.log) == 1 and Ledger(plan, Store(tmp_path)).counts()[State.OPEN] == 3
    LocalLauncher(Listener(), runner=runner).launch(plan, Store(tmp_path))
    assert len(runner.log) == 4 and Ledger(plan, Store(tmp_path)).counts()[State.OPEN] == 0


def test_what_goes_wrong_in_a_slot_ends_the_launch(overrides: list[str], tmp_path: Path) -> None:
    def fill_the_disk(*_: Any) -> None:
        raise StoreError("no space")

    before = set(threading.enumerate())
    with pytest.raises(StoreError, match="no space"):
        LocalLauncher(Listener(), runner=rehearsal(fill_the_disk)).launch(plan_of(overrides, "dense"), Store(tmp_path))
    assert not [thread for thread in threading.enumerate() if thread not in before and not thread.daemon]


def cut_off(times: int) -> Callable[..., Outcome | None]:
    """The quality of the reference is cut off by a full disk so many times."""
    left = iter(range(times))

    def act(cell: Cell, stage: Stage, card: int | None) -> Outcome | None:
        if (cell.identity.pipeline, stage) != ("dense", Stage.QUALITY) or next(left, None) is None:
            return None
        return Outcome(Status.TRANSIENT, "test", 1.0, failure=Failure(type="OSError", message="full", reason=Reason.DISK))

    return act


def test_a_reference_that_was_cut_off_is_made_again_before_what_is_compared_with_it(overrides: list[str], tmp_path: Path) -> None:
    plan, runner, store = plan_of([*overrides, "limits.retry_pause_s=0.1"], "rtn-4bit"), rehearsal(cut_off(2)), Store(tmp_path)
    LocalLauncher(Listener(), runner=runner).launch(plan, store)
    order = [name for name, stage, *_ in runner.log if stage is Stage.QUALITY]
    assert order == ["dense", "dense", "dense", "rtn-4bit"]
    assert [s for name, s, *_ in runner.log if name == "dense"].index(Stage.SPEED) == 1, "other work goes on meanwhile"
    record = recorded(store, plan.cells[0], Stage.QUALITY)
    assert record and [attempt.reason for attempt in record.attempts] == [Reason.DISK] * 2 and record.wall_seconds == 2.0
    assert of(Ledger(plan, store)) is ExitCode.NOTHING_MEASURED


def test_a_result_that_found_no_room_is_put_by_the_next_run_and_not_measured_again(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, runner, store = plan_of(overrides, "dense"), rehearsal(measured), Store(tmp_path)

    def full(path: Path, record: Record) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StoreError, match=r"No space left on device; it is kept in .* until the next run"):
        patch.setattr(stores, "write", full)
        LocalLauncher(Listener(), runner=runner).launch(plan, store)
    assert len(runner.log) == 1 and not store.files()
    LocalLauncher(Listener(), runner=runner).launch(make_again(plan), store)
    assert len(runner.log) == 2 and Ledger(plan, store).counts()[State.FAILED] == 2


def measured(cell: Cell, stage: Stage, card: int | None) -> Outcome:
    return Outcome(Status.FAILED, "test", 1.0, failure=Failure(type="Test", message="a fact"))


def make_again(plan: Plan) -> Plan:
    """The same plan, of a later command."""
    return plan.model_copy(update={"created": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")})


def test_what_is_cut_off_again_and_again_is_left_with_what_waits_for_it(overrides: list[str], tmp_path: Path) -> None:
    mine = [*overrides, "limits.retries=2", "limits.retry_pause_s=0.01"]
    plan, runner, store = plan_of(mine, "rtn-4bit"), rehearsal(cut_off(9)), Store(tmp_path)
    LocalLauncher(Listener(), runner=runner).launch(plan, store)
    ran = [(name, stage) for name, stage, *_ in runner.log]
    assert ran.count(("dense", Stage.QUALITY)) == 3 and ("rtn-4bit", Stage.QUALITY) not in ran
    assert ("rtn-4bit", Stage.SPEED) in ran, "what does not wait for it runs"
    ledger = Ledger(plan, store)
    assert ledger.counts()[State.TRANSIENT] == 1 and ledger.counts()[State.OPEN] == 1 and of(ledger) is ExitCode.STOPPED
    LocalLauncher(Listener(), runner=runner).launch(plan, store)
    assert len(runner.log) == len(ran) + 3, "the next run tries as often again"


def without(reason: Reason, works: tuple[str, ...] = ()) -> Callable[..., Outcome | None]:
    """Every stage fails for want of what all need, but those of some methods."""

    def act(cell: Cell, stage: Stage, card: int | None) -> Outcome | None:
        if cell.identity.pipeline in works:
            return None
        return Outcome(Status.TRANSIENT, "test", 1.0, failure=Failure(type="OSError", message="gone", reason=reason))

    return act


@pytest.mark.parametrize("reason", [Reason.NETWORK, Reason.HUB, Reason.DISK])
def test_what_fails_for_all_alike_ends_the_launch_after_four_times(overrides: list[str], tmp_path: Path, reason: Reason) -> None:
    names = ("rtn-2bit", "rtn-3bit", "rtn-4bit", "rtn-8bit", "nf4", "fp4", "magnitude")
    plan = make_plan([cell([*overrides, "limits.retry_pause_s=0"], f"method={name}", "stages=[]") for name in names])
    runner, store, told = rehearsal(without(reason)), Store(tmp_path), Listener()
    told.note = lambda text: notes.append(text)  # type: ignore[method-assign]
    notes: list[str] = []
    LocalLauncher(told, runner=runner).launch(plan, store)
    assert len(runner.log) == 4 and len(notes) == 1 and "failed 4 times in a row" in notes[0]
    assert of(Ledger(plan, store)) is ExitCode.STOPPED
    again = rehearsal()
    LocalLauncher(Listener(), runner=again).launch(plan, store)
    assert len(again.log) == len(plan.tasks), "the next run begins anew"


@pytest.mark.parametrize(
    ("reason", "works"), [(Reason.INTERRUPTED, ()), (Reason.CARD, ()), (Reason.NETWORK, ("rtn-3bit", "rtn-8bit", "fp4"))]
)
def test_what_fails_for_one_or_not_for_all_ends_no_launch(
    overrides: list[str], tmp_path: Path, reason: Reason, works: tuple[str, ...]
) -> None:
    names = ("rtn-2bit", "rtn-3bit", "rtn-4bit", "rtn-8bit", "nf4", "fp4", "magnitude")
    plan = make_plan([cell([*overrides, "limits.retries=0"], f"method={name}", "stages=[]") for name in names])
    runner = rehearsal(without(reason, works))
    LocalLauncher(Listener(), runner=runner).launch(plan, Store(tmp_path))
    assert len(runner.log) == len(plan.tasks)


def cards(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    from dataclasses import replace

    from slimbench.harness.launch import local
    from slimbench.harness.run import cell as cells
    from slimbench.harness.run.planning import memory, obstacles

    gpu = Gpu(name="card", memory_bytes=80 * 10**9, driver="1", compute_capability="9.0")
    own = replace(machine.hardware(), gpus=[gpu] * count)
    for module in (local, cells, memory, obstacles):
        monkeypatch.setattr(module, "hardware", lambda: own)
