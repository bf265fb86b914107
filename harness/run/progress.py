"""What the console shows while cells run: the stage, its progress, the stages done and the time that remains."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from slimbench.harness.run.cell import Cell
from slimbench.harness.run.runner import with_reference
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store
from slimbench.util.text import one_line

_COLOURS = {Status.OK: "green", Status.UNSUPPORTED: "yellow"}


def plan(cells: Iterable[Cell]) -> Iterator[tuple[Cell, Stage]]:
    """Every stage of the cells and of their references, in the order in which they run."""
    return ((part, stage) for cell in cells for part in with_reference(cell) for stage in part.stages())


class ProgressDisplay:
    """A listener of the runner. Estimates are the mean wall times of recorded stages of the same kind.

    Args:
        plan: The stages that will run; one that stands there twice runs once.
        store: Its records tell how long stages take.
    """

    def __init__(self, plan: Iterable[tuple[Cell, Stage]], store: Store, console: Console) -> None:
        self.console = console
        self._open = {(stage, part.identity.keys.of(stage)): (part, stage) for part, stage in plan}
        self._total = len(self._open)
        self._seconds: dict[Stage, list[float]] = defaultdict(list)
        for record in store.scan()[0]:
            if record.status is Status.OK and record.wall_seconds is not None:
                self._seconds[record.stage].append(record.wall_seconds)
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
        self._current: TaskID | None = None
        self._began = time.monotonic()

    def __enter__(self) -> ProgressDisplay:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def stage_started(self, cell: Cell, stage: Stage) -> None:
        self._began = time.monotonic()
        self._current = self._bars.add_task(f"{cell.label} {stage}", total=None, note="start")

    def stage_event(self, event: dict[str, Any]) -> None:
        if self._current is None:
            return
        if event["event"] == "phase":
            self._bars.update(self._current, total=None, completed=0, note=event["name"])
        elif event["event"] == "progress":
            self._bars.update(self._current, total=event["total"], completed=round(event["done"], 2))
        self._refresh()

    def stage_ended(self, cell: Cell, stage: Stage, record: Record, reused: bool) -> None:
        if self._current is not None and not reused:
            self._bars.remove_task(self._current)
            self._current = None
        if self._open.pop((stage, record.key), None) is None:
            return
        if record.status is not Status.OK and stage is Stage.COMPRESS:
            for other in cell.stages()[1:]:
                self._open.pop((other, cell.identity.keys.of(other)), None)
        if record.simulated:
            self._open.pop((Stage.SPEED, cell.identity.keys.speed), None)
        if not reused and record.status is Status.OK:
            self._seconds[stage].append(record.wall_seconds or 0)
        done = self._total - len(self._open)
        how = "recorded" if reused else f"{record.wall_seconds or 0:.0f} s"
        reason = record.failure.summary if record.failure else ""
        self._refresh()
        line = Text.assemble(
            (f"{done:>3}/{self._total} ", "dim"),
            cell.label,
            (f" {stage} ", "dim"),
            (record.status.value, _COLOURS.get(record.status, "red")),
            (f" {how} · {self._remaining()}", "dim"),
            f"  {reason}" if reason else "",
        )
        self.console.print(line, soft_wrap=True)

    def note(self, text: str) -> None:
        self.console.print(Text(one_line(text), style="dim"), soft_wrap=True)

    def _refresh(self) -> None:
        self._bars.update(self._overall, completed=self._total - len(self._open), note=self._remaining())

    def _remaining(self) -> str:
        """Time that the open stages will take, from the mean of their kind; the running one counts what it has left."""
        known = [statistics.fmean(values) for values in self._seconds.values() if values]
        if not self._open:
            return "done"
        if not known:
            return "no estimate yet"
        fallback = statistics.fmean(known)
        left = sum(statistics.fmean(self._seconds[stage]) if self._seconds[stage] else fallback for _, stage in self._open.values())
        if self._current is not None:
            left = max(left - (time.monotonic() - self._began), 1.0)
        return f"about {left / 60:.0f} min left" if left >= 90 else f"about {left:.0f} s left"
