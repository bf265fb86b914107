"""Walks the stages of a cell: reuse what is recorded, run what is not, record whatever came of it."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from slimbench.harness.config import engines, environments
from slimbench.harness.measure.hardware import available_cores, available_memory, hardware
from slimbench.harness.run import provenance, public
from slimbench.harness.run.cell import Cell
from slimbench.harness.run.worker import Outcome, Task, Worker
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.record import Failure, Record
from slimbench.harness.stages import models
from slimbench.harness.store import artefact
from slimbench.harness.store.store import Store
from slimbench.methods.base import Unsupported, format_of

PLAN = "plan"  # phase of a stage that was not started; what this machine lacks, another may have
_MEMORY_SHARE = 0.95
_FINAL = (Status.OK, Status.UNSUPPORTED)


class Listener(Protocol):
    """Who is told what the runner does; the console's progress display."""

    def stage_started(self, cell: Cell, stage: Stage) -> None: ...

    def stage_event(self, event: dict[str, Any]) -> None: ...

    def stage_ended(self, cell: Cell, stage: Stage, record: Record, reused: bool) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass
class Runner:
    """Runs cells one after another in one results folder, and the reference of each before it."""

    store: Store
    listener: Listener

    def __post_init__(self) -> None:
        self._workers: dict[tuple[str, bool], Worker] = {}
        self._done: set[tuple[Stage, str]] = set()

    def run(self, cell: Cell) -> list[Record]:
        """Run a cell and, first, its reference. A stage that cannot run is a record, never an exception.

        Raises:
            harness.store.store.StoreError: The results folder cannot be written.
        """
        records: list[Record] = []
        for part in with_reference(cell):
            records = self._run_one(part)
        return records

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()

    def _run_one(self, cell: Cell) -> list[Record]:
        compressed = self.stage(cell, Stage.COMPRESS)
        records = [compressed]
        if compressed.status is not Status.OK:
            return records
        for stage in cell.stages()[1:]:
            if not (stage is Stage.SPEED and compressed.simulated):
                records.append(self.stage(cell, stage))
        return records

    def stage(self, cell: Cell, stage: Stage) -> Record:
        """The record of one stage of a cell, run unless there is one to reuse. Errors as of `run`."""
        existing = self._reusable(cell, stage)
        if existing is None:
            with self.store.lock(
                cell.identity, stage, cell.hardware(stage), lambda: self.listener.note(f"{cell.label}: waiting for another run of {stage}")
            ):
                existing = self._reusable(cell, stage)
                if existing is None:
                    return self._execute(cell, stage)
        self.listener.stage_ended(cell, stage, existing, reused=True)
        return existing

    def _reusable(self, cell: Cell, stage: Stage) -> Record | None:
        """The record that makes running the stage needless, or None."""
        record = self.store.get(cell.identity, stage, cell.hardware(stage))
        if record is not None and record.phase != PLAN and (stage, record.key) in self._done:
            return record
        return reusable(self.store, cell, stage)

    def _execute(self, cell: Cell, stage: Stage) -> Record:
        self.listener.stage_started(cell, stage)
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        outcome = cannot_run(cell, stage) or self._artefacts_ready(cell, stage) or self._work(cell, stage)
        record = Record(
            stage=stage,
            status=outcome.status,
            key=cell.identity.keys.of(stage),
            cell=cell.identity,
            hardware=cell.hardware(stage),
            phase=outcome.phase,
            started=started,
            wall_seconds=outcome.wall_seconds,
            peak_memory_bytes=outcome.peak_memory_bytes,
            failure=outcome.failure,
            config=public.config(cell.recorded_config()),
            command=cell.command,
            provenance=provenance.of_machine(cell.config.seed, cell.config.device.threads or available_cores())
            | _environment_facts(cell, stage)
            | (outcome.provenance or provenance.of_process()),
            **{stage.value: outcome.result},  # type: ignore[arg-type]
        )
        self.store.put(record)
        self._done.add((stage, record.key))
        self.listener.stage_ended(cell, stage, record, reused=False)
        return record

    def _work(self, cell: Cell, stage: Stage) -> Outcome:
        limit, threads = cell.config.limits.memory_gb, cell.config.device.threads or available_cores()
        device = cell.config.device.model_copy(update={"threads": threads})
        task = Task(
            stage=stage,
            config=cell.config.model_copy(update={"device": device}).model_dump(mode="json", by_alias=True),
            keys=cell.identity.keys.model_dump() | {"prefixes": _prefix_keys(cell, stage)},
            reference_key=self._reference_key(cell, stage),
            wall_s=cell.config.limits.wall_s,
            memory_bytes=int(limit * 1e9 if limit else _MEMORY_SHARE * available_memory()),
        )
        return self._worker(cell, stage).run(task, self.listener.stage_event)

    def _reference_key(self, cell: Cell, stage: Stage) -> str | None:
        """Compress key of the reference; None where it ended badly, so that a candidate that fits is measured without it."""
        if not cell.config.is_reference:
            record = recorded(self.store, cell.reference(), stage)
            if record is not None and record.status is not Status.OK:
                return None
        return cell.identity.reference.compress

    def _worker(self, cell: Cell, stage: Stage) -> Worker:
        environment = _environment(cell, stage)
        python = str(environments.get(environment).python) if environment else sys.executable
        key = (python, is_offline(cell))
        return self._workers.setdefault(key, Worker(*key))

    def _artefacts_ready(self, cell: Cell, stage: Stage) -> Outcome | None:
        """Make artefacts again that are recorded but no longer (or not on this machine) in the cache."""
        if stage is Stage.COMPRESS:
            return None
        alone = cell.config.is_reference or self._reference_key(cell, stage) is None
        wanted = [cell] if alone else [cell, cell.reference()]
        for part in wanted:
            if artefact.exists(part.identity.keys.compress):
                continue
            self.listener.note(f"{part.label}: making the artefact again, it is not in the cache")
            outcome = self._work(part, Stage.COMPRESS)
            if outcome.status is not Status.OK:
                return outcome
        return None


def _environment(cell: Cell, stage: Stage) -> str | None:
    """Name of the environment that a stage runs in, None for this program's own."""
    if stage is not Stage.COMPRESS:
        return cell.config.engine.environment
    return next((method.needs.environment for method in cell.methods if method.needs.environment), None)


def _environment_facts(cell: Cell, stage: Stage) -> dict[str, Any]:
    """The environment of a stage by name, where it has one of its own, and what was asked of pip for it."""
    name = _environment(cell, stage)
    return {"environment": {"name": name, "requirements": environments.get(name).requirements}} if name else {}


def _prefix_keys(cell: Cell, stage: Stage) -> list[str]:
    """Compress keys of the shorter pipelines that the one of the cell begins with, the shortest first."""
    return [cell.prefix_key(steps) for steps in range(1, len(cell.methods))] if stage is Stage.COMPRESS else []


def with_reference(cell: Cell) -> Iterator[Cell]:
    """The reference of a cell, if it is another one, and the cell itself. A method that refuses the model needs no reference."""
    if not cell.config.is_reference and _misfit(cell) is None:
        yield cell.reference()
    yield cell


def reusable(store: Store, cell: Cell, stage: Stage) -> Record | None:
    """The record that makes running a stage needless, under the cell's `device.hardware` and `on_existing`."""
    return next((record for record in _eligible(store, cell, stage) if is_reusable(record, cell)), None)


def recorded(store: Store, cell: Cell, stage: Stage) -> Record | None:
    """The record that stands for a stage of a cell, whatever came of it."""
    return next(_eligible(store, cell, stage), None)


def _eligible(store: Store, cell: Cell, stage: Stage) -> Iterator[Record]:
    """That of this hardware first; where any will do, compression and quality that ended well on other hardware."""
    hardware = cell.hardware(stage)
    if record := store.get(cell.identity, stage, hardware):
        yield record
    if cell.config.device.hardware == "any" and stage is not Stage.SPEED:
        yield from (other for other in store.elsewhere(cell.identity, stage, hardware) if other.status is Status.OK)


def is_reusable(record: Record, cell: Cell) -> bool:
    """Whether the record stands, under the cell's `on_existing`, so that its stage is not run again."""
    if record.phase == PLAN or (record.failure and record.failure.interrupted):
        return False
    redo = {
        "keep": False,
        "failed": record.status not in _FINAL,
        "stale": is_stale(record),
        "all": True,
    }[cell.config.on_existing]
    return not redo


def is_stale(record: Record) -> bool:
    """Made with another version of slimbench, torch, transformers, lm-eval, or a library that the methods call, where its stage ran."""
    ran_in = record.provenance.get("environment")
    name = ran_in.get("name") if isinstance(ran_in, dict) else None
    environment = environments.catalogue().get(name) if isinstance(name, str) else None
    then, now = record.provenance.get("packages", {}), provenance.packages(environment)
    called = {str(step.get("reference", "")).partition(":")[0] for step in record.cell.steps}
    return any(then.get(name) != now.get(name) for name in {"slimbench", "torch", "transformers", "lm_eval"} | called)


def is_offline(cell: Cell) -> bool:
    """Whether nothing of the cell lies on the hub."""
    config = cell.config
    sources = [config.model.source, *config.suite.corpus, config.calibration.source]
    return not any(s.startswith("hf:") for s in sources) and (config.suite.include_path is not None or not config.suite.tasks)


def cannot_run(cell: Cell, stage: Stage) -> Outcome | None:
    """An `unsupported` outcome where it is known beforehand that a stage of the cell cannot run on this machine."""
    machine, config = hardware(), cell.config
    device = config.device.compress if stage is Stage.COMPRESS else config.device.name
    only = [(s.name, m.needs.device) for s, m in zip(config.pipeline, cell.methods, strict=True) if m.needs.device not in (None, device)]
    if stage is Stage.COMPRESS and only:
        return _unsupported(f"{only[0][0]} runs on {only[0][1]} only, and device.compress is {device}")
    if device == "cuda" and not machine.gpus:
        needing = next((s.name for s, m in zip(config.pipeline, cell.methods, strict=True) if m.needs.device == "cuda"), None)
        asked = config.device.name == "cuda" or not needing
        return _unsupported(
            "device=cuda, but this machine has no CUDA card that torch can use"
            if asked
            else f"{needing} needs a CUDA card; this machine has none"
        )
    needed = models.weight_bytes(config.model)
    room = machine.gpus[config.device.index].memory_bytes if device == "cuda" else available_memory()
    if needed and needed > room:
        return _unsupported(f"the weights of {config.model.name} need {needed / 1e9:.0f} GB, this machine has {room / 1e9:.0f} GB")
    if stage is not Stage.COMPRESS:
        return _engine_cannot_run(cell)
    environment = _environment(cell, stage)
    if environment and not environments.get(environment).is_made:
        return _unsupported(f"{cell.identity.pipeline} needs its environment: slimbench env make {environment}")
    misfit = _misfit(cell)
    return _unsupported(misfit) if misfit else None


def _misfit(cell: Cell) -> str | None:
    """Why a method refuses the model's shape, where that is known before the model is loaded."""
    shape = models.known_shape(cell.config.model)
    for method in cell.methods if shape else ():
        try:
            method.check(shape)
        except Unsupported as error:
            return str(error)
    return None


def _engine_cannot_run(cell: Cell) -> Outcome | None:
    engine, device, format_ = cell.config.engine, cell.config.device.name, format_of(cell.methods)
    if format_ not in engine.loaders:
        return _unsupported(f"engine {engine.name} does not load format {format_}; it loads {', '.join(engine.loaders)}")
    if device not in engine.devices:
        return _unsupported(f"engine {engine.name} runs on {' and '.join(engine.devices)}, not on {device}")
    reason = engines.missing(engine)
    return _unsupported(f"engine {engine.name} {reason}") if reason else None


def _unsupported(message: str) -> Outcome:
    return Outcome(Status.UNSUPPORTED, PLAN, 0.0, failure=Failure(type="Unsupported", message=message))
