"""A runner with a listener that remembers, and a cell of the tiny model through all its stages on one worker."""

from __future__ import annotations

from typing import Any

from slimbench.harness.config.compose import resolve
from slimbench.harness.run.cell import Cell, make_cell
from slimbench.harness.run.planning.ledger import Ledger, recorded
from slimbench.harness.run.planning.plan import make_plan
from slimbench.harness.run.runner import Runner
from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.record import Record


class Listener:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, Stage]] = []
        self.reused: list[tuple[str, Stage]] = []
        self.phases: list[str] = []

    def stage_started(self, cell: Cell, stage: Stage) -> None:
        pass

    def stage_event(self, cell: Cell, stage: Stage, event: dict[str, Any]) -> None:
        if event["event"] == "phase":
            self.phases.append(event["name"])

    def stage_ended(self, cell: Cell, stage: Stage, record: Record, reused: bool) -> None:
        (self.reused if reused else self.ran).append((cell.identity.pipeline, stage))

    def note(self, text: str) -> None:
        pass


def cell(overrides: list[str], *more: str) -> Cell:
    return make_cell(resolve([*overrides, *more]), (*overrides, *more))


def run(runner: Runner, cell: Cell) -> list[Record]:
    """Run what is open of a cell and its reference; the records of the cell, in the order of its stages."""
    plan = make_plan([cell])
    ledger, runner.since = Ledger(plan, runner.store), plan.created
    for task in plan.tasks:
        if ledger.ending(task) is None and ledger.is_ready(task):
            runner.attempt(plan.cells[task.cell].cell, task.stage)
    mine = next(planned for planned in plan.cells if planned.identity == cell.identity)
    return [record for task in plan.of(mine) if (record := recorded(runner.store, mine, task.stage))]
