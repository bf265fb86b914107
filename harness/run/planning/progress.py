"""What is shown while a plan runs: the stages under way, those that ended, and the time that remains."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from slimbench.harness.run.cell import Cell
from slimbench.harness.run.planning.estimates import Estimates
from slimbench.harness.run.planning.ledger import Ending, Ledger, State
from slimbench.harness.run.planning.plan import Plan, Task, task_name
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store
from slimbench.util.text import one_line

HEARTBEAT_S = 30.0
PACE_S = 10.0
"""Seconds of a phase from which on its pace says how long the rest takes."""
_COLOURS = {Status.OK: "green", Status.UNSUPPORTED: "yellow", Status.TRANSIENT: "yellow"}


@dataclass
class _Current:
    """A stage that runs.

    Attributes:
        first: When the phase was heard of first, and how much of it was done then; a run that goes on begins in the middle.
    """

    bar: TaskID
    label: str
    began: float
    phase: str = "start"
    share: str = ""
    first: tuple[float, float] | None = None
    left: float | None = None

    def counted(self, done: float, total: float) -> None:
        """Take note of how much of the phase is done, and of how many seconds the rest takes at the pace so far."""
        now, self.share = time.monotonic(), f" {done:.0f}/{total:.0f}"
        if self.first is None or done < self.first[1]:
            self.first = now, done
        since, before = self.first
        self.left = (now - since) / (done - before) * (total - done) if now - since >= PACE_S and done > before else None

    def told(self) -> str:
        """Phase, share, time so far and time left, as far as they are known."""
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        rest = "" if self.left is None else f" ({in_words(self.left)})"
        return f"{self.phase}{self.share} {minutes}:{seconds:02d}{rest}"


class ProgressDisplay:
    """A listener of the runners, from any number of threads. On a terminal it shows bars, elsewhere a line every half minute.

    Args:
        plan: What will run.
        store: What is recorded of it counts as done.
        timings: Its records tell how long stages take; those of `store` if none is given.
    """

    def __init__(self, plan: Plan, store: Store, console: Console, timings: Store | None = None) -> None:
        self.console = console
        self._plan, self._ledger, self._estimates = plan, Ledger(plan, store), Estimates(timings or store)
        self._total = len(plan.tasks)
        self._current: dict[str, _Current] = {}
        self._turn = threading.RLock()
        self._ended = threading.Event()
        self._bars = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            transient=True,
        )
        self._overall = self._bars.add_task("stages", total=self._total, note="")

    def __enter__(self) -> ProgressDisplay:
        self._earlier()
        self._bars.start()
        if not self.console.is_terminal:
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._bars.stop()

    def stage_started(self, cell: Cell, stage: Stage) -> None:
        with self._turn:
            label = f"{cell.label} {stage}"
            bar = self._bars.add_task(label, total=None, note="start")
            self._current[task_name(cell.identity, stage)] = _Current(bar, label, time.monotonic())

    def stage_event(self, cell: Cell, stage: Stage, event: dict[str, Any]) -> None:
        with self._turn:
            current = self._current.get(task_name(cell.identity, stage))
            if current is None:
                return
            if event["event"] == "phase":
                current.phase, current.share, current.first, current.left = event["name"], "", None, None
                self._bars.update(current.bar, total=None, completed=0, note=event["name"])
            elif event["event"] == "progress":
                current.counted(event["done"], event["total"])
                self._bars.update(current.bar, total=event["total"], completed=round(event["done"], 2))

    def stage_ended(self, cell: Cell, stage: Stage, record: Record, reused: bool) -> None:
        with self._turn:
            name = task_name(cell.identity, stage)
            if (current := self._current.pop(name, None)) is not None:
                self._bars.remove_task(current.bar)
            if (task := self._plan.by_name.get(name)) is None:
                return
            if not reused and record.status is Status.OK:
                self._estimates.learn(self._plan.cells[task.cell], stage, record.wall_seconds or 0)
            how = "recorded" if reused else f"{record.wall_seconds or 0:.0f} s"
            reason = f"  {record.failure.summary}" if record.failure else ""
            self._refresh()
            self._print(
                (f"{self._done():>3}/{self._total} ", "dim"),
                cell.label,
                (f" {stage} ", "dim"),
                (record.status.value, _COLOURS.get(record.status, "red")),
                (f" {how} · {self._left()}", "dim"),
                reason,
            )

    def note(self, text: str) -> None:
        self._print((one_line(text), "dim"))

    def _earlier(self) -> None:
        """Say what is recorded already, and of what did not end well, that it was not now."""
        endings = [(task, ending) for task in self._plan.tasks if (ending := self._ledger.ending(task)) and ending.earlier]
        if not endings:
            return
        self._print(f"{len(endings)} of {self._total} stages are recorded")
        for task, ending in endings:
            if ending.state is State.FAILED:
                self._print(f"{self._plan.cells[task.cell].label} {task.stage} {told_earlier(ending)}")

    def _beat(self) -> None:
        """A line for each stage that runs, as long as something runs."""
        while not self._ended.wait(HEARTBEAT_S):
            with self._turn:
                for current in self._current.values():
                    self._print(f"    {current.label}", (f" {current.told()} · {self._left()}", "dim"))

    def _print(self, *parts: str | tuple[str, str]) -> None:
        """A line of texts, each as it is or with its style."""
        self.console.print(Text.assemble(*parts), soft_wrap=True)

    def _done(self) -> int:
        return sum(self._ledger.ending(task) is not None for task in self._plan.tasks)

    def _refresh(self) -> None:
        self._bars.update(self._overall, completed=self._done(), note=self._left())

    def _left(self) -> str:
        """Time that the open tasks will take one after another; those that run count what they have left, by their pace at least."""
        waiting = list(self._ledger.open())
        if not waiting:
            return "done"
        each = [self._rest(task) for task in waiting if not task.refusal]
        return "no estimate of all yet" if None in each else in_words(max(sum(rest for rest in each if rest), 1.0))

    def _rest(self, task: Task) -> float | None:
        """Seconds that a task still takes; None where nothing says so."""
        expected = self._estimates.seconds(self._plan.cells[task.cell], task.stage)
        if (current := self._current.get(task.name)) is None:
            return expected
        passed = time.monotonic() - current.began
        known = [value for value in (expected and expected - passed, current.left) if value is not None]
        return max(0.0, *known) if known else None


def told_earlier(ending: Ending) -> str:
    """A failure that was recorded before this run: when, why, and how it is tried again."""
    when = ending.started[:16].replace("T", " ")
    return f"{ending.status} earlier ({when} UTC): {ending.reason}; on_existing=failed runs it again"


def in_words(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"
