"""Runs one stage of a cell: nothing where its record stands, a record of whatever came of it where not."""

from __future__ import annotations

import datetime
import sys
from dataclasses import dataclass, replace
from typing import Any, Protocol

from slimbench.harness.config import environments, lock
from slimbench.harness.config.schema import RunConfig
from slimbench.harness.measure.hardware import available_cores, available_memory
from slimbench.harness.run import hub, journal, provenance, public, reuse, turns
from slimbench.harness.run.cell import Cell
from slimbench.harness.run.planning.ledger import recorded, reusable
from slimbench.harness.run.planning.obstacles import environment, lost_card, obstacle
from slimbench.harness.run.planning.plan import task_name
from slimbench.harness.run.worker import Closed, Outcome, Task, Worker
from slimbench.harness.schema.identity import Reason, Stage, Status
from slimbench.harness.schema.record import PLAN, Attempt, Failure, Record
from slimbench.harness.store import partial, spool
from slimbench.harness.store.store import Store, StoreError, Superseded

_MEMORY_SHARE = 0.95


class Listener(Protocol):
    """Who is told what the runner does; the console's progress display."""

    def stage_started(self, cell: Cell, stage: Stage) -> None: ...

    def stage_event(self, cell: Cell, stage: Stage, event: dict[str, Any]) -> None: ...

    def stage_ended(self, cell: Cell, stage: Stage, record: Record, reused: bool) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass
class Runner:
    """Runs stages in one results folder, each in a process of its own.

    Attributes:
        since: What was recorded from then on is not run again, whatever `on_existing` says; ISO 8601, UTC.
        card: Index of the first CUDA card on which stages with `device=cuda` run; None for that of the configuration.
    """

    store: Store
    listener: Listener
    since: str = ""
    card: int | None = None

    def __post_init__(self) -> None:
        self._workers: dict[tuple[str, bool, tuple[int, ...]], Worker] = {}
        self._closed = self._interrupted = False

    def interrupt(self) -> None:
        """End the stage that runs within seconds, and begin no other; from any thread or signal handler.

        Its record is `transient`, and `attempt` returns it.
        """
        self._interrupted = True
        for worker in list(self._workers.values()):
            worker.interrupt()

    def close(self) -> None:
        """End whatever runs, from any thread; a stage that is cut off so leaves no record."""
        self._closed = True
        for worker in list(self._workers.values()):
            worker.close()

    def attempt(self, cell: Cell, stage: Stage) -> Record | None:
        """The record of a stage, run unless it stands; None where another process is at it.

        A stage that cannot run is a record, never an exception.

        Raises:
            harness.store.store.StoreError: The results folder cannot be written.
            harness.run.worker.Closed: `interrupt` or `close` was called before anything began, or `close` meanwhile.
        """
        if self.card is not None:
            device = cell.config.device.model_copy(update={"index": self.card})
            cell = replace(cell, config=cell.config.model_copy(update={"device": device}))
        with self.store.lock(cell.identity, stage, cell.hardware(stage)) as mine:
            if not mine:
                return None
            if kept := spool.deliver(self.store, cell.identity, stage, cell.hardware(stage)):
                self.listener.note(f"{cell.label}: {stage} was measured at {kept.started}, when its record could not be written; now it is")
                partial.discard(self._partial(cell, stage)["partial"])
            record = reusable(self.store, cell, stage, self.since)
            if record is None:
                before = self.store.get(cell.identity, stage, cell.hardware(stage))
                if changed := reuse.changed_code(before, cell.config) if before else []:
                    self.listener.note(
                        f"{cell.label}: {stage} again, the code of {' and '.join(changed)} has changed since it was recorded"
                    )
                return self._execute(cell, stage, before.as_attempts() if before else [])
        self.listener.stage_ended(cell, stage, record, reused=True)
        return record

    def _execute(self, cell: Cell, stage: Stage, attempts: list[Attempt]) -> Record | None:
        self.listener.stage_started(cell, stage)
        journal.note(task := task_name(cell.identity, stage))
        code = lock.fingerprints(cell.config, stage)
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        outcome = self._outcome(cell, stage)
        record = Record(
            stage=stage,
            status=outcome.status,
            key=cell.identity.keys.of(stage),
            cell=cell.identity,
            hardware=cell.hardware(stage),
            phase=outcome.phase,
            started=started,
            wall_seconds=outcome.wall_seconds + sum(attempt.seconds for attempt in attempts),
            attempts=attempts,
            peak_memory_bytes=outcome.peak_memory_bytes,
            failure=outcome.failure,
            config=public.config(cell.recorded_config()),
            command=cell.command,
            code=code,
            provenance=provenance.of_machine(cell.config.seed, cell.config.device.threads or available_cores())
            | _environment_facts(cell, stage)
            | (outcome.provenance or provenance.of_process()),
            **{stage.value: outcome.result},  # type: ignore[arg-type]
        )
        try:
            self.store.put(record)
        except Superseded as error:
            self.listener.note(f"{cell.label}: {error}; what was measured here is dropped")
            return None
        except StoreError as error:
            where = spool.keep(self.store, record) if record.status is not Status.TRANSIENT else None
            raise StoreError(f"{error}; it is kept in {where} until the next run" if where else str(error)) from error
        journal.note(task, record.status)
        if record.status is not Status.TRANSIENT:
            partial.discard(self._partial(cell, stage)["partial"])
        self.listener.stage_ended(cell, stage, record, reused=False)
        return record

    def _outcome(self, cell: Cell, stage: Stage) -> Outcome:
        if reason := lost_card(cell, stage):
            return Outcome(Status.TRANSIENT, PLAN, 0.0, failure=Failure(type="NoCard", message=reason, reason=Reason.CARD))
        if reason := obstacle(cell, stage):
            return Outcome(Status.UNSUPPORTED, PLAN, 0.0, failure=Failure(type="Unsupported", message=reason))
        return self._artefacts_ready(cell, stage) or self._work(cell, stage)

    def _work(self, cell: Cell, stage: Stage) -> Outcome:
        limit, threads = cell.config.limits.memory_gb, cell.config.device.threads or available_cores()
        task = Task(
            stage=stage,
            config=self._seen_by_the_worker(cell.config, threads).model_dump(mode="json", by_alias=True),
            keys=cell.identity.keys.model_dump() | {"prefixes": _prefix_keys(cell, stage)} | self._partial(cell, stage),
            reference_key=self._reference_key(cell, stage),
            wall_s=cell.config.limits.wall_s,
            memory_bytes=int(limit * 1e9 if limit else _MEMORY_SHARE * available_memory()),
        )

        def tell(event: dict[str, Any]) -> None:
            self.listener.stage_event(cell, stage, event)

        def wait(text: str) -> None:
            tell({"event": "phase", "name": text})

        with turns.turn(turns.places(cell.config, stage), task.wall_s, wait, lambda: self._closed or self._interrupted) as fault:
            return turns.marked(self._worker(cell, stage).run(task, tell), stage, fault)

    def _partial(self, cell: Cell, stage: Stage) -> dict[str, str]:
        """What the worker needs to know to keep a stage's work, and to go on with that of earlier attempts."""
        name = f"{stage}-{cell.identity.keys.of(stage)}-{cell.hardware(stage).fingerprint}-{self.store.claim()}"
        return {"partial": name, "since": self.since if cell.config.on_existing == "all" else ""}

    def _seen_by_the_worker(self, config: RunConfig, threads: int) -> RunConfig:
        """The configuration with its threads, in a process that sees no other cards than its own."""
        return config.model_copy(update={"device": config.device.model_copy(update={"threads": threads, "index": 0})})

    def _reference_key(self, cell: Cell, stage: Stage) -> str | None:
        """Compress key of the reference; None where it ended badly for good, so that a candidate that fits is measured without it."""
        if not cell.config.is_reference:
            record = recorded(self.store, cell.reference(), stage)
            if record is not None and record.status not in (Status.OK, Status.TRANSIENT):
                return None
        return cell.identity.reference.compress

    def _worker(self, cell: Cell, stage: Stage) -> Worker:
        name = environment(cell, stage)
        python = str(environments.get(name).python) if name else sys.executable
        key = (python, not hub.is_needed(cell.config), _cards(cell.config))
        worker = self._workers.setdefault(key, Worker(*key))
        if self._closed or self._interrupted:
            raise Closed
        return worker

    def _artefacts_ready(self, cell: Cell, stage: Stage) -> Outcome | None:
        """Make artefacts again that are not in the cache as they were recorded: gone, damaged, or made by other code."""
        if stage is Stage.COMPRESS:
            return None
        alone = cell.config.is_reference or self._reference_key(cell, stage) is None
        parts = [cell] if alone else [cell, cell.reference()]
        return next((outcome for part in parts if (outcome := self._artefact_ready(part)) is not None), None)

    def _artefact_ready(self, cell: Cell) -> Outcome | None:
        """Make an artefact again if need be; what came of it where it still cannot be used.

        Two artefacts of one key on one machine must be the same bytes, or a row would mix what was measured on both.
        """
        key, hardware = cell.identity.keys.compress, cell.hardware(Stage.COMPRESS)
        record = self.store.get(cell.identity, Stage.COMPRESS, hardware)
        if (fault := reuse.artefact_fault(key, cell.config, record)) is None:
            return None
        self.listener.note(f"{cell.label}: making the artefact again, {fault}")
        with self.store.lock(cell.identity, Stage.COMPRESS, hardware, wait=True):
            if reuse.artefact_fault(key, cell.config, record):
                outcome = self._work(cell, Stage.COMPRESS)
                if outcome.status is not Status.TRANSIENT:
                    partial.discard(self._partial(cell, Stage.COMPRESS)["partial"])
                if outcome.status is not Status.OK:
                    return outcome
        if (difference := reuse.other_bytes(key, record)) is None:
            return None
        versions = "+".join(f"{method.name} {method.version}" for method in cell.methods)
        message = f"other bytes under one version of {versions}: {difference}; on_existing=all measures everything again"
        return Outcome(Status.FAILED, PLAN, 0.0, failure=Failure(type="OtherBytes", message=message))


def _cards(config: RunConfig) -> tuple[int, ...]:
    """The cards that the stages of a cell see."""
    device = config.device
    return tuple(range(device.index, device.index + device.cards)) if "cuda" in (device.name, device.compress) else ()


def _environment_facts(cell: Cell, stage: Stage) -> dict[str, Any]:
    """The environment of a stage by name, where it has one of its own, and what was asked of pip for it."""
    name = environment(cell, stage)
    return {"environment": {"name": name, "requirements": environments.get(name).requirements}} if name else {}


def _prefix_keys(cell: Cell, stage: Stage) -> list[str]:
    """Compress keys of the artefacts on the way to that of the cell, the first one first."""
    return cell.prefix_keys() if stage is Stage.COMPRESS else []
