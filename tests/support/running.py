"""A cell through all its stages, in the test's own process and on one worker."""

from __future__ import annotations

from slimbench.harness.run.cell import Cell
from slimbench.harness.run.planning.ledger import Ledger, recorded
from slimbench.harness.run.planning.plan import make_plan
from slimbench.harness.run.runner import Runner
from slimbench.harness.schema.record import Record


def run(runner: Runner, cell: Cell) -> list[Record]:
    """Run what is open of a cell and its reference; the records of the cell, in the order of its stages."""
    plan = make_plan([cell])
    ledger, runner.since = Ledger(plan, runner.store), plan.created
    for task in plan.tasks:
        if ledger.ending(task) is None:
            runner.attempt(plan.cells[task.cell].cell, task.stage)
    mine = next(planned for planned in plan.cells if planned.identity == cell.identity)
    return [record for task in plan.of(mine) if (record := recorded(runner.store, mine, task.stage))]
