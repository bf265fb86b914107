"""Engines side by side: the speed of each cell in processes of its own, which take turns.

No process holds two engines, so runs of them cannot be interleaved as those of an artefact and its reference are. Instead each round
measures every cell in a new process, every other round in the reverse order, so that drift of the machine falls on all alike. A round
gives one figure of each kind, the median of its process; engines are compared round by round. Beside it stands dense on the same engine,
interleaved as ever.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.measure.soundness import weights_read
from slimbench.harness.run.cell import Cell
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.record import Record
from slimbench.harness.stats.intervals import FEWEST_FOR_MEDIAN, median_interval
from slimbench.harness.store.store import Store
from slimbench.util.files import cache_dir, write_atomically
from slimbench.util.text import one_line, slug

if TYPE_CHECKING:
    from rich.console import Console


class Failed(Exception):
    """A cell could not be measured: one line with the reason."""


@dataclass(frozen=True)
class TurnRow:
    """What one process measured at the headline of the protocol.

    Attributes:
        weight_bytes: That a decode step reads.
        prefill_ms: Median of the process, of the whole batch.
        decode_ms: The same of a decode step.
        dense_prefill_ms: Of the reference on the same engine, in turns with these; None where the cell is its own reference.
        dense_decode_ms: The same of a decode step.
        read_gbs: Best read bandwidth that was measured between the runs; None where the engine's process measured none.
        bandwidth_fraction: `weight_bytes` / `decode_ms` / `read_gbs`; above 1 where weights lie in a cache.
        build: What the engine's code is compiled for, with its versions.
        flags: Of the record, such as other load on the machine.
    """

    hardware: str
    model: str
    method: str
    engine: str
    round: int
    batch: int
    prompt: int
    new_tokens: int
    weight_bytes: int
    prefill_ms: float
    decode_ms: float
    dense_prefill_ms: float | None
    dense_decode_ms: float | None
    read_gbs: float | None
    bandwidth_fraction: float | None
    build: str
    flags: str


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one engine is as another, or as dense on its own: the median over rounds.

    Attributes:
        low: Lower bound of its 95 % interval; None of fewer than six rounds.
        high: Upper bound.
    """

    engine: str
    other: str
    what: str
    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None else f" ({self.low:.2f} to {self.high:.2f})"
        return f"{self.what}: {self.engine} is {self.value:.2f} × as fast as {self.other}{interval}"


def check(cells: Sequence[Cell]) -> None:
    """Raise `ConfigError` unless these are cells that differ in their engines alone."""
    engines = [cell.config.engine.name for cell in cells]
    if len(set(engines)) < 2 or len(set(engines)) < len(engines):
        raise ConfigError(f"engines are compared, and these cells have {', '.join(engines)}: give engine=compiled,llamacpp")
    first = cells[0]
    for cell in cells[1:]:
        if (cell.identity.keys.compress, cell.config.speed) != (first.identity.keys.compress, first.config.speed):
            raise ConfigError(f"cells are to differ in their engines alone: '{cell.label}' is not '{first.label}'")
    if first.config.speed.processes != 1:
        raise ConfigError("each round is a process of each engine: give speed.processes=1")


def write(cells: Sequence[Cell], rounds: int, out: Path, console: Console) -> tuple[Path, list[TurnRow]]:
    """Measure and write `engines-ENGINES-MODEL-METHOD-FINGERPRINT.csv`, round after round, so that what is measured stays.

    Raises:
        Failed: A cell cannot be measured here.
    """
    import pandas as pd

    first = cells[0]
    engines = "-".join(cell.config.engine.name for cell in cells)
    name = slug(f"{engines}-{first.identity.model}-{first.identity.pipeline}")
    table, rows = out / f"engines-{name}-{first.hardware(Stage.SPEED).fingerprint}.csv", list[TurnRow]()
    for row in _measured(cells, rounds, console):
        rows.append(row)
        write_atomically(table, pd.DataFrame([asdict(each) for each in rows]).to_csv(index=False).encode())
    return table, rows


def ratios(rows: Sequence[TurnRow]) -> list[Ratio]:
    """Of the first engine to each other one, then of each to dense on itself; only rounds that all of them have count."""
    by_engine: dict[str, dict[int, TurnRow]] = {}
    for row in rows:
        by_engine.setdefault(row.engine, {})[row.round] = row
    rounds = sorted(set.intersection(*({*held} for held in by_engine.values())))
    first, *others = by_engine
    found = []
    for what in ("decode", "prefill"):
        for other in others:
            pairs = [(by_engine[other][r], by_engine[first][r]) for r in rounds]
            found.append(_ratio(first, other, what, [_ms(a, what) / _ms(b, what) for a, b in pairs]))
    for engine, held in by_engine.items():
        for what in ("decode", "prefill"):
            known = [(dense, _ms(held[r], what)) for r in rounds if (dense := getattr(held[r], f"dense_{what}_ms")) is not None]
            if known:
                found.append(_ratio(engine, "dense", what, [dense / ms for dense, ms in known]))
    return found


def _ms(row: TurnRow, what: str) -> float:
    found: float = getattr(row, f"{what}_ms")
    return found


def _ratio(engine: str, other: str, what: str, values: Sequence[float]) -> Ratio:
    bounds = median_interval(values) if len(values) >= FEWEST_FOR_MEDIAN else ()
    return Ratio(engine, other, what, statistics.median(values), *bounds)


def _measured(cells: Sequence[Cell], rounds: int, console: Console) -> Iterator[TurnRow]:
    from slimbench.harness.run.planning.plan import make_plan, task_name
    from slimbench.harness.run.planning.progress import ProgressDisplay
    from slimbench.harness.run.runner import Runner

    plan = make_plan(cells).only({task_name(cell.identity, Stage.SPEED) for cell in cells})
    for task in plan.tasks:
        if task.refusal:
            raise Failed(one_line(f"{plan.cells[task.cell].config.engine.name}: {task.refusal}"))
    with tempfile.TemporaryDirectory(prefix="engines-", dir=cache_dir()) as folder:
        for number in range(rounds):
            store = Store(Path(folder) / str(number))
            console.print(f"round {number + 1} of {rounds}")
            with ProgressDisplay(plan, store, console) as display:
                runner = Runner(store, display)
                try:
                    for cell in cells if number % 2 == 0 else reversed(cells):
                        yield _row(cell, number, runner.attempt(cell, Stage.SPEED))
                finally:
                    runner.close()


def _row(cell: Cell, number: int, record: Record | None) -> TurnRow:
    assert record is not None, "nobody else knows of this folder"
    if record.status is not Status.OK or record.speed is None or record.speed.evidence is None:
        message = record.failure.message if record.failure else record.status.value
        raise Failed(one_line(f"{cell.config.engine.name}: {message}"))
    speed, evidence = record.speed, record.speed.evidence
    point = speed.points[0]
    size, decode = weights_read(evidence), statistics.median(point.candidate.decode_ms)
    read, dense = speed.read_bandwidth_gbs, None if cell.config.is_reference else point.reference
    return TurnRow(
        hardware=record.hardware.label,
        model=cell.identity.model,
        method=cell.identity.pipeline,
        engine=cell.config.engine.name,
        round=number,
        batch=point.batch,
        prompt=point.prompt,
        new_tokens=point.new_tokens,
        weight_bytes=size,
        prefill_ms=statistics.median(point.candidate.prefill_ms),
        decode_ms=decode,
        dense_prefill_ms=statistics.median(dense.prefill_ms) if dense else None,
        dense_decode_ms=statistics.median(dense.decode_ms) if dense else None,
        read_gbs=read,
        bandwidth_fraction=size / decode / read / 1e6 if read else None,
        build=speed.build or "not shown",
        flags="; ".join(speed.flags),
    )
