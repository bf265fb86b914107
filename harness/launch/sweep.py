"""Runs and sweeps from the command line's view: plan, launch, exit code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slimbench.harness.config import compose
from slimbench.harness.config.parse import parse
from slimbench.harness.config.schema import ConfigError
from slimbench.harness.run.cell import Cell, make_cell
from slimbench.harness.schema.identity import Keys, Stage, Status
from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store, StoreError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from slimbench.harness.run.runner import Runner

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


class _Session:
    """What the jobs of one sweep in this process share. A job launched elsewhere (a cluster) finds none and makes its own."""

    def __init__(self, on_done: CellDone) -> None:
        self.on_done = on_done
        self.runner: Runner | None = None
        self.records: list[Record] = []
        self.error: StoreError | None = None


_session: _Session | None = None


def run(overrides: Sequence[str], on_done: CellDone = lambda cell, store: None) -> Finished:
    """Run one cell."""
    return _measure([make_cell(compose.resolve(overrides), tuple(overrides))], None, on_done)


def sweep(overrides: Sequence[str], on_done: CellDone = lambda cell, store: None) -> Finished:
    """Run a Hydra multirun of cells. Every job is validated before the first one starts."""
    cells = [make_cell(config, tuple(job)) for job, config in compose.jobs(overrides)]
    return _measure(cells, overrides, on_done)


def plan(overrides: Sequence[str]) -> list[PlannedCell]:
    """What `sweep` would do with each cell, and with each reference, in order; nothing is run or written."""
    from slimbench.harness.run.runner import with_reference

    cells = [make_cell(config, tuple(job)) for job, config in compose.jobs(overrides)]
    for cell in cells:
        require_extras(cell)
    parts = {part.identity.keys.model_dump_json(): part for cell in cells for part in with_reference(cell)}
    return [_planned(part) for part in parts.values()]


def _planned(cell: Cell) -> PlannedCell:
    from slimbench.harness.run.runner import cannot_run, is_reusable

    store, simulated, reason = Store(Path(cell.config.results)), False, ""
    stages: dict[Stage, str] = {}
    for stage in cell.stages():
        if stage is Stage.SPEED and simulated:
            continue
        record = store.get(cell.identity, stage)
        if record is not None and is_reusable(record, cell):
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


def _measure(cells: list[Cell], multirun: Sequence[str] | None, on_done: CellDone) -> Finished:
    global _session
    from rich.console import Console

    from slimbench.harness.run.progress import ProgressDisplay, plan
    from slimbench.harness.run.runner import Runner

    for cell in cells:
        require_extras(cell)
    store, console = Store(Path(cells[0].config.results)), Console(stderr=True)
    console.print(f"{len(cells)} cell{'s' * (len(cells) > 1)} → {store.root}/", highlight=False)
    session = _session = _Session(on_done)
    with ProgressDisplay(plan(cells), store, console) as display:
        session.runner = Runner(store, display)
        try:
            if multirun is None:
                session.records = session.runner.run(cells[0])
                on_done(cells[0], store)
            else:
                compose.launch(multirun, job)
        finally:
            session.runner.close()
            _session = None
    if session.error:
        raise session.error
    code = 0 if all(record.status in _FINE for record in session.records) else 1
    return Finished(code, store.root, [k for cell in cells for k in (cell.identity.reference, cell.identity.keys)])


def job(config: DictConfig) -> None:
    """One job of a multirun, in this process or wherever the launcher put it."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    overrides = tuple(HydraConfig.get().overrides.task)
    cell = make_cell(parse(OmegaConf.to_container(config, resolve=True)), overrides)  # type: ignore[arg-type]
    if _session is None or _session.runner is None:
        _alone(cell)
        return
    if _session.error is None:
        try:
            _session.records += _session.runner.run(cell)
            _session.on_done(cell, _session.runner.store)
        except StoreError as error:
            _session.error = error


def _alone(cell: Cell) -> None:
    from rich.console import Console

    from slimbench.harness.run.progress import ProgressDisplay, plan
    from slimbench.harness.run.runner import Runner

    store = Store(Path(cell.config.results))
    with ProgressDisplay(plan([cell]), store, Console(stderr=True)) as display:
        runner = Runner(store, display)
        try:
            runner.run(cell)
        finally:
            runner.close()


def require_extras(cell: Cell) -> None:
    """Raise `ConfigError` with the install command if a method's library is missing."""
    for step, method in zip(cell.config.pipeline, cell.methods, strict=True):
        if missing := method.needs.missing_modules():
            extra = f"'slimbench[{method.needs.extra}]'" if method.needs.extra else " ".join(missing)
            raise ConfigError(f"method '{step.name}' needs {', '.join(missing)}: pip install {extra}")
