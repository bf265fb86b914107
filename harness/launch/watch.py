"""Waiting for stages that run elsewhere: what starts and ends is read from the results folder, and told as if it ran here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from slimbench.harness.run.planning.ledger import Ledger, recorded
from slimbench.harness.run.planning.plan import Plan, PlannedCell
from slimbench.harness.run.runner import Listener
from slimbench.harness.store.store import Store

POLL_S = 2.0
_LATE_S = 10.0  # how much later than its job's end a record may be seen on a shared folder


def watch(
    plan: Plan,
    store: Store,
    listener: Listener,
    on_done: Callable[[PlannedCell], None],
    left: Callable[[], int | None],
    seconds: float | None = None,
) -> None:
    """Return when all tasks of a plan have ended, or when nobody is left who would run the others.

    Args:
        on_done: Told of each cell that was asked for when all its stages have ended.
        left: How many jobs wait or run; None where that cannot be told at the moment.
        seconds: The longest time.
    """
    began, idle_since = time.monotonic(), None
    for _ in _looks(plan, store, listener, on_done):
        now = time.monotonic()
        if left() == 0:
            idle_since = idle_since or now
            if now - idle_since >= _LATE_S:
                return
        else:
            idle_since = None
        if seconds is not None and now - began > seconds:
            return
        time.sleep(POLL_S)


def _looks(plan: Plan, store: Store, listener: Listener, on_done: Callable[[PlannedCell], None]) -> Iterator[None]:
    """Look at the store again and again, telling what has changed, until all tasks have ended."""
    ledger, under_way = Ledger(plan, store), set[str]()
    told = {task.name for task in plan.tasks if ledger.ending(task)}
    waiting = {index for index, cell in enumerate(plan.cells) if cell.asked and cell.stages}
    while True:
        held = store.holders()
        for task in plan.tasks:
            cell = plan.cells[task.cell]
            if task.name in told:
                continue
            ended = ledger.ending(task) is not None
            if task.name in held and not ended:
                if task.name not in under_way:
                    under_way.add(task.name)
                    listener.stage_started(cell.cell, task.stage)
            elif ended or task.name in under_way:  # what left its place without an ending was cut off
                record = recorded(store, cell, task.stage)
                if record is not None:
                    listener.stage_ended(cell.cell, task.stage, record, reused=False)
                under_way.discard(task.name)
                told |= {task.name} if ended else set()
        for index in sorted(waiting):
            if all(ledger.ending(task) for task in plan.of(plan.cells[index])):
                waiting.discard(index)
                on_done(plan.cells[index])
        if not any(ledger.open()):
            return
        yield
