"""Prints how far speed figures can be trusted on this machine: A/A runs, the spread of one cell, and whether other load is noticed.

Run by hand on a quiet machine: `python -m tests.bench.speed_noise [--repeats 20] [--cells 10] [--load]`. Exits with 1 where
a target is missed. It is no test: timings do not gate a merge.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from slimbench.harness.config.compose import resolve
from slimbench.harness.config.schema import SpeedConfig
from slimbench.harness.measure.latency import Instruments, measure_point
from slimbench.harness.measure.loaded import LoadedModel
from slimbench.harness.measure.machine import LoadWatch
from slimbench.harness.run.cell import Cell, make_cell
from slimbench.harness.schema.speed import SpeedPointResult
from slimbench.harness.stages import common, compress
from slimbench.harness.stats.bootstrap import UNDEFINED
from slimbench.harness.stats.intervals import FEWEST_FOR_MEDIAN
from slimbench.harness.stats.speedups import paired_speedup
from slimbench.harness.store import artefact

WITHIN, HELD, SECONDS = 0.03, 0.95, 120.0


class _Silent:
    def phase(self, name: str) -> None: ...

    def progress(self, done: float, total: float) -> None: ...


def loaded(cell: Cell) -> LoadedModel:
    """The artefact of a cell in memory, made if it is not there."""
    key = cell.identity.keys.compress
    if not artefact.exists(key):
        compress.run(cell.config, key, _Silent())
    return common.load(cell.config, key, _Silent())[0]


@contextmanager
def busy_core(wanted: bool) -> Iterator[None]:
    """One core kept busy by a process that is no child of this one."""
    if not wanted:
        yield
        return
    code = "import os\nif os.fork(): os._exit(0)\nprint(os.getpid(), flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        try:
            yield
        finally:
            os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Measured:
    """One measurement: the speed-up with its 95 % interval, the seconds it took, the load flags."""

    ratio: float
    low: float
    high: float
    seconds: float
    flags: list[str]


def measured(candidate: LoadedModel, reference: LoadedModel, config: SpeedConfig, what: str) -> Measured:
    """Measure the headline point once and print it."""
    instruments = Instruments.of(candidate.device, config.flush_cache)
    watch, began = LoadWatch(instruments.card), time.perf_counter()
    point = measure_point(candidate, reference, config.grid[0], config, instruments, lambda fraction: None)
    seconds, (_, flags) = time.perf_counter() - began, watch.read()
    ratio, low, high = paired_speedup(point.candidate.decode_ms, point.reference.decode_ms)  # type: ignore[union-attr]
    if len(point.candidate.decode_ms) < FEWEST_FOR_MEDIAN:
        low, high = UNDEFINED
    print(f"{what}: {ratio:.4f} [{low:.4f}, {high:.4f}] {_describe(point)} {seconds:.0f} s {'; '.join(flags)}", flush=True)
    return Measured(ratio, low, high, seconds, flags)


def _describe(point: SpeedPointResult) -> str:
    widths = " ".join(f"{name} ±{width:.1%}" if width is not None else f"{name} –" for name, width in point.half_widths.items())
    copies = [probe.copy_gbs for probe in point.probes]
    return f"{len(point.candidate.decode_ms)} pairs, {point.stopped}; {widths}; copy {min(copies):.1f}–{max(copies):.1f} GB/s;"


def spread(candidate: LoadedModel, reference: LoadedModel, config: SpeedConfig, cells: int, load: bool) -> bool:
    """Measure one cell several times; says whether the targets were met.

    On a quiet machine all ratios lie within ±3 % of their median, each in time and without a load flag; under load each is flagged.
    """
    with busy_core(load):
        runs = [measured(candidate, reference, config, f"cell {i + 1}{' under load' if load else ''}") for i in range(cells)]
    middle, seconds = (statistics.median(getattr(run, name) for run in runs) for name in ("ratio", "seconds"))
    worst, slowest = max(abs(run.ratio / middle - 1) for run in runs), max(run.seconds for run in runs)
    flagged = sum(any("other load" in flag for flag in run.flags) for run in runs)
    print(f"{'beside a busy process' if load else 'quiet'}, {cells} times:")
    print(f"  speed-up {middle:.3f}, worst deviation {worst:.2%}" + ("" if load else f" (target {WITHIN:.0%})"))
    print(f"  seconds: median {seconds:.0f}, worst {slowest:.0f}" + ("" if load else f" (target {SECONDS:.0f})"))
    print(f"  load flag in {flagged} (target {cells if load else 0})")
    return flagged == cells if load else worst <= WITHIN and slowest <= SECONDS and not flagged


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20, help="A/A measurements")
    parser.add_argument("--cells", type=int, default=10, help="measurements of the cell rtn-4bit")
    parser.add_argument("--load", action="store_true", help="the cell also beside a process that loads one core")
    parser.add_argument("overrides", nargs="*", help="as for `slimbench run`; the first point of the speed grid is measured")
    asked = parser.parse_args()
    overrides = ("device=cpu", "speed=standard", *asked.overrides)
    cell = make_cell(resolve([*overrides, "method=rtn-4bit"]), (*overrides, "method=rtn-4bit"))
    torch.set_num_threads(cell.config.device.threads or torch.get_num_threads())
    dense, speed, met = loaded(cell.reference()), cell.config.speed, []
    if asked.repeats:
        runs = [measured(dense, dense, speed, f"A/A {i + 1}") for i in range(asked.repeats)]
        held = sum(run.low <= 1 <= run.high for run in runs)
        print(f"A/A: the interval holds 1.00 in {held} of {asked.repeats} (target {HELD:.0%})")
        met.append(held >= HELD * asked.repeats)
    if asked.cells:
        candidate = loaded(cell)
        met += [spread(candidate, dense, speed, asked.cells, load) for load in ((False, True) if asked.load else (False,))]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
