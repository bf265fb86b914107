"""Runs and sweeps from the command line's view: plan, launch, exit code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slimbench.harness.config import compose
from slimbench.harness.config.schema import ConfigError
from slimbench.harness.run.cell import Cell, make_cell
from slimbench.harness.schema.identity import Keys, Stage, Status
from slimbench.harness.store.store import Store

CellDone = Callable[[Cell, Store], None]  # told of each cell whose stages have ended

_FINE = (Status.OK, Status.UNSUPPORTED)


@dataclass(frozen=True)
class Finished:
    """What a run or sweep came to: its exit code, the results folder, and the keys of its cells, references included."""

    exit_code: int
    results: Path
    keys: list[Keys]


@dataclass(frozen=True)
class PlannedCell:
    """What a sweep would do with a cell: for each stage `recorded STATUS`, `run` or `cannot run`, and the reason for that."""

    cell: Cell
    stages: dict[Stage, str]
    reason: str = ""


def run(overrides: Sequence[str], on_done: CellDone = lambda cell, store: None) -> Finished:
    """Run one cell."""
    return _measure([make_cell(compose.resolve(overrides), tuple(overrides))], on_done)


def sweep(overrides: Sequence[str], on_done: CellDone = lambda cell, store: None) -> Finished:
    """Run a Hydra multirun of cells. Every job is validated before the first one starts."""
    cells = [make_cell(config, tuple(job)) for job, config in compose.jobs(overrides)]
    return _measure(cells, on_done)


def plan(overrides: Sequence[str]) -> list[PlannedCell]:
    """What `sweep` would do with each cell, and with each reference, in order; nothing is run or written."""
    cells = [make_cell(config, tuple(job)) for job, config in compose.jobs(overrides)]
    for cell in cells:
        require_extras(cell)
    from slimbench.harness.run.runner import with_reference

    parts = {part.identity.keys.model_dump_json(): part for cell in cells for part in with_reference(cell)}
    return [_planned(part) for part in parts.values()]


def _planned(cell: Cell) -> PlannedCell:
    from slimbench.harness.run.runner import cannot_run, reusable

    store, simulated, reason = Store(Path(cell.config.results)), False, ""
    stages: dict[Stage, str] = {}
    for stage in cell.stages():
        if stage is Stage.SPEED and simulated:
            continue
        record = reusable(store, cell, stage)
        if record is not None:
            stages[stage], ends = f"recorded {record.status.value}", record.status is not Status.OK
            simulated |= record.simulated
        elif outcome := cannot_run(cell, stage):
            stages[stage], ends = "cannot run", True
            reason = reason or (outcome.failure.message if outcome.failure else "")
        else:
            stages[stage], ends = "run", False
        if stage is Stage.COMPRESS and ends:
            break
    return PlannedCell(cell, stages, reason)


def _measure(cells: list[Cell], on_done: CellDone) -> Finished:
    from rich.console import Console

    from slimbench.harness.run.progress import ProgressDisplay, plan
    from slimbench.harness.run.runner import Runner

    for cell in cells:
        require_extras(cell)
    store, console, records = Store(Path(cells[0].config.results)), Console(stderr=True), []
    console.print(f"{len(cells)} cell{'s' * (len(cells) > 1)} → {store.root}/", highlight=False)
    with ProgressDisplay(plan(cells), store, console) as display:
        runner = Runner(store, display)
        try:
            for cell in cells:
                records += runner.run(cell)
                on_done(cell, store)
        finally:
            runner.close()
    code = 0 if all(record.status in _FINE for record in records) else 1
    return Finished(code, store.root, [k for cell in cells for k in (cell.identity.reference, cell.identity.keys)])


def require_extras(cell: Cell) -> None:
    """Raise `ConfigError` with the install command if a method's library is missing."""
    for step, method in zip(cell.config.pipeline, cell.methods, strict=True):
        if missing := method.needs.missing_modules():
            extra = f"'slimbench[{method.needs.extra}]'" if method.needs.extra else " ".join(missing)
            raise ConfigError(f"method '{step.name}' needs {', '.join(missing)}: pip install {extra}")
