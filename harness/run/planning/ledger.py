"""What a plan has come to: for each task how it ended, read from the store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from slimbench.harness.config import environments
from slimbench.harness.config.schema import OnExisting, RunConfig
from slimbench.harness.run import provenance, reuse
from slimbench.harness.run.cell import Cell
from slimbench.harness.run.planning.plan import Plan, PlannedCell, Task, task_name
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.record import PLAN, Record
from slimbench.harness.store.store import Store

_FINAL = (Status.OK, Status.UNSUPPORTED)


class State(StrEnum):
    """Where a task stands. `transient`: open, and the last attempt was cut off."""

    OK = "ok"
    FAILED = "failed"
    UNSUPPORTED = "unsupported"
    NEEDLESS = "needless"
    OPEN = "open"
    TRANSIENT = "transient"


@dataclass(frozen=True)
class Ending:
    """How a task ended.

    Attributes:
        status: Of its record; None where there is nothing to do: its compression did not end well, or its artefact is only simulated.
        reason: One line, where it did not end well.
        earlier: The record was there before the plan was made.
    """

    status: Status | None
    reason: str = ""
    started: str = ""
    simulated: bool = False
    earlier: bool = False

    @property
    def state(self) -> State:
        if self.status is None:
            return State.NEEDLESS
        return State(self.status.value) if self.status in _FINAL else State.FAILED


class Ledger:
    """The endings of a plan's tasks. Each record is read once; what has ended stays so.

    Args:
        plan: What was asked for.
        store: Where the records are.
        with_code: Hold what records were made with against the code that the plan names, which may import it.
    """

    def __init__(self, plan: Plan, store: Store, with_code: bool = True) -> None:
        self.plan, self.store, self._with_code = plan, store, with_code
        self._endings: dict[str, Ending] = {}

    def ending(self, task: Task) -> Ending | None:
        """How a task ended; None while it is to be run."""
        if task.name not in self._endings and (ending := self._look(task)):
            self._endings[task.name] = ending
        return self._endings.get(task.name)

    def state(self, task: Task) -> State:
        if ending := self.ending(task):
            return ending.state
        record = recorded(self.store, self.plan.cells[task.cell], task.stage)
        return State.TRANSIENT if record is not None and record.status is Status.TRANSIENT else State.OPEN

    def is_ready(self, task: Task) -> bool:
        """Whether all that must come before has ended."""
        return all(self.ending(self.plan.by_name[name]) for name in task.after if name in self.plan.by_name)

    def open(self) -> Iterator[Task]:
        """The tasks that are to be run, in order."""
        return (task for task in self.plan.tasks if self.ending(task) is None)

    def counts(self) -> dict[State, int]:
        states = [self.state(task) for task in self.plan.tasks]
        return {state: states.count(state) for state in State}

    def has_measured(self) -> bool:
        """Whether a measurement of a cell that was asked for ended well, or its compression where nothing else was asked for."""
        for cell in self.plan.cells:
            tasks = self.plan.of(cell)
            measured = [task for task in tasks if task.stage is not Stage.COMPRESS] or tasks
            if cell.asked and any(self.state(task) is State.OK for task in measured):
                return True
        return False

    def _look(self, task: Task) -> Ending | None:
        cell = self.plan.cells[task.cell]
        if record := reusable(self.store, cell, task.stage, self.plan.created, self._with_code):
            reason = record.failure.summary if record.failure else ""
            return Ending(record.status, reason, record.started, record.simulated, record.started < self.plan.created)
        before = self.plan.by_name.get(task_name(cell.identity, Stage.COMPRESS))
        if task.stage is Stage.COMPRESS or before is None or (compressed := self.ending(before)) is None:
            return None
        if compressed.status is not Status.OK:
            return Ending(None, f"its compression ended as {compressed.status}")
        return Ending(None, "simulated") if compressed.simulated and task.stage is Stage.SPEED else None


def reusable(store: Store, cell: Cell | PlannedCell, stage: Stage, since: str = "", with_code: bool = True) -> Record | None:
    """The record that makes running a stage needless, under the cell's `device.hardware` and `on_existing`."""
    return next((record for record in _eligible(store, cell, stage) if stands(record, cell.config, since, with_code)), None)


def recorded(store: Store, cell: Cell | PlannedCell, stage: Stage) -> Record | None:
    """The record that stands for a stage of a cell, whatever came of it."""
    return next(_eligible(store, cell, stage), None)


def _eligible(store: Store, cell: Cell | PlannedCell, stage: Stage) -> Iterator[Record]:
    """That of this hardware first; where any will do, compression and quality that ended well on other hardware.

    Where a cluster runs the stages, who asks may have other hardware than its nodes: there all of them count.
    """
    hardware = cell.hardware(stage)
    if record := store.get(cell.identity, stage, hardware):
        yield record
    if not cell.config.launcher.is_local:
        yield from store.elsewhere(cell.identity, stage, hardware)
    elif cell.config.device.hardware == "any" and stage is not Stage.SPEED:
        yield from (other for other in store.elsewhere(cell.identity, stage, hardware) if other.status is Status.OK)


def stands(record: Record, config: RunConfig, since: str, with_code: bool = True) -> bool:
    """Whether a record makes running its stage needless: it was made since then, or stands under the cell's `on_existing`.

    Args:
        with_code: And its code is what it was when the record was made.
    """
    if record.status is Status.TRANSIENT:
        return False
    if since and record.started >= since:
        return True
    if record.phase == PLAN:
        return False
    return not _is_redone(record, config.on_existing) and not (with_code and reuse.changed_code(record, config))


def _is_redone(record: Record, on_existing: OnExisting) -> bool:
    """Whether the stage of a record is run again because it was asked for."""
    if on_existing == "stale":
        return is_stale(record)
    return on_existing == "all" or (on_existing == "failed" and record.status not in _FINAL)


def is_stale(record: Record) -> bool:
    """Made with another version of slimbench, torch, transformers, lm-eval, or a library that the methods call, where its stage ran."""
    ran_in = record.provenance.get("environment")
    name = ran_in.get("name") if isinstance(ran_in, dict) else None
    environment = environments.catalogue().get(name) if isinstance(name, str) else None
    then, now = record.provenance.get("packages", {}), provenance.packages(environment)
    called = {str(step.get("reference", "")).partition(":")[0] for step in record.cell.steps}
    return any(then.get(name) != now.get(name) for name in {"slimbench", "torch", "transformers", "lm_eval"} | called)
