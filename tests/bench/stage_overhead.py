"""What it costs to run a stage in a process of its own, beside running it here: `python -m tests.bench.stage_overhead [METHOD]`.

Both make and measure the tiny model of the tests; the server is up, and each side has been warmed up. Printed are medians: seconds on
the clock, and seconds of processors, which other work on the machine lengthens less.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from slimbench.harness.run.cell import Cell
from slimbench.harness.run.runner import Runner
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.stages import stage as stages
from slimbench.harness.store.store import Store
from tests.support.running import Listener, cell
from tests.support.tiny import save_text, save_tiny, tiny_overrides

REPEATS = 5


class Silent:
    """A reporter that nobody listens to."""

    def phase(self, name: str) -> None: ...

    def progress(self, done: float, total: float) -> None: ...


@dataclass(frozen=True)
class Cost:
    """Seconds on the clock, and of processors: those of this process, the server and its stages."""

    wall: float
    processors: float

    def __str__(self) -> str:
        return f"{self.wall:.2f} s ({self.processors:.2f} s of processors)"


def through_the_worker(runner: Runner, this: Cell, kind: Stage, repeats: int = REPEATS) -> Cost:
    """What a stage costs with its process and its record."""

    def act() -> None:
        record = runner.attempt(this, kind)
        assert record and record.status is Status.OK, record

    return _median(act, repeats)


def in_this_process(this: Cell, kind: Stage, repeats: int = REPEATS) -> Cost:
    """What the work of a stage alone costs."""
    arguments = this.config, this.identity.keys.model_dump(), this.identity.reference.compress
    return _median(lambda: stages.run(kind, *arguments, Silent()), repeats)


def _median(act: Callable[[], Any], repeats: int) -> Cost:
    act()
    costs = []
    for _ in range(repeats):
        began, spent = time.perf_counter(), _processors()
        act()
        costs.append((time.perf_counter() - began, _processors() - spent))
    wall, processors = (statistics.median(column) for column in zip(*costs, strict=True))
    return Cost(wall, processors)


def _processors() -> float:
    family = [psutil.Process(), *psutil.Process().children()]
    return sum(times.user + times.system + times.children_user + times.children_system for times in (p.cpu_times() for p in family))


def main(method: str = "dense") -> None:
    with tempfile.TemporaryDirectory() as name:
        model, text = save_tiny(Path(name) / "tiny"), Path(name) / "corpus.txt"
        save_text(text)
        mine = [*tiny_overrides(model, text), "on_existing=all", f"method={method}"]
        this, runner = cell(mine), Runner(Store(Path(name) / "results"), Listener())
        try:
            for kind in (Stage.COMPRESS, Stage.QUALITY):
                print(f"{kind}: {through_the_worker(runner, this, kind)} through the worker, {in_this_process(this, kind)} in this process")
        finally:
            runner.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
