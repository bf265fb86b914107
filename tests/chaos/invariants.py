"""What must hold whatever was thrown: of a launch as it ends, and of the folders once the same command has come to its end."""

from __future__ import annotations

import datetime
import json
import re
import signal
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from slimbench.harness.schema.identity import Status
from slimbench.harness.schema.record import PLAN, Record
from slimbench.harness.store.store import Store, Unreadable
from slimbench.util.hashing import hash_file
from tests.chaos.scene import Fault, Journal, Launch, Scene

_GRACE_S = 10.0  # for processes to be gone after the end of a launch
_TIMES = re.compile(r"(seconds|_s|_ms)$")
_SEEN_S = 1.0  # until the campaign has certainly seen that a process is gone


class Outcome(StrEnum):
    """What a fault did to a sweep."""

    OK = "ok"
    LOST = "lost"
    DOUBLED = "doubled"
    TORN = "torn"
    FOREIGN = "foreign"
    CHANGED = "changed"
    ORPHAN = "orphan"
    LEFTOVER = "leftover"
    FACT = "fact"
    EXIT = "exit"
    HUNG = "hung"
    INCOMPLETE = "incomplete"


@dataclass(frozen=True)
class Breach:
    """An invariant that did not hold, and how that shows in one line."""

    outcome: Outcome
    what: str


@dataclass(frozen=True)
class Calm:
    """What the same sweep gives where nothing is thrown: the numbers of each record by its path in the results folder.

    Attributes:
        tasks: Stage and key of each.
    """

    numbers: dict[str, Any]
    tasks: frozenset[str]

    @classmethod
    def of(cls, results: Path) -> Calm:
        """Raises `ValueError` if the sweep is not whole."""
        records, unreadable = _scan(results)
        if unreadable or not records or any(record.status is not Status.OK for record in records.values()):
            raise ValueError(f"the calm sweep in {results} did not end well: {unreadable or [r.status for r in records.values()]}")
        tasks = frozenset(f"{record.stage}-{record.key}" for record in records.values())
        return cls({path: numbers(record) for path, record in records.items()}, tasks)


def numbers(record: Record) -> Any:
    """What a record says that no clock and no other load changes: claim and hashes, scores; of speed, which points were measured."""
    if record.compress:
        told = record.compress.model_dump(mode="json", include={"claim", "files", "disk_bytes"})
    elif record.quality:
        told = record.quality.model_dump(mode="json", exclude={"load", "evidence", "seconds", "load_seconds", "work", "flags"})
    elif record.speed:
        told = {"points": [[point.batch, point.prompt, point.new_tokens] for point in record.speed.points]}
    else:
        told = {}
    return _timeless(told)


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _timeless(part) for name, part in value.items() if not _TIMES.search(name)}
    return [_timeless(part) for part in value] if isinstance(value, list) else value


def _scan(results: Path) -> tuple[dict[str, Record], list[Unreadable]]:
    records, unreadable = Store(results).scan() if results.exists() else ([], [])
    store = Store(results)
    return {str(store.path(r.cell, r.stage, r.hardware).relative_to(results)): r for r in records}, unreadable


def of_launch(scene: Scene, launch: Launch, calm: Calm, faults: list[Fault]) -> list[Breach]:
    """What did not hold as a launch ended.

    Args:
        faults: All that have been thrown into the case so far.
    """
    breaches, open_ = list(_orphans(scene, "after a launch")), []
    for place in scene.places:
        records, _ = _scan(place)
        for path, record in records.items():
            if path in calm.numbers and record.status is not Status.OK and not _passes(record):
                message = record.failure.summary if record.failure else ""
                breaches.append(Breach(Outcome.FACT, f"{path} was recorded as {record.status}: {message}"))
        open_ += [path for path in calm.numbers if path not in records or records[path].status is not Status.OK]
    for code, said in zip(launch.codes, launch.said, strict=True):
        if code is None:
            breaches.append(Breach(Outcome.HUNG, f"no end after {launch.seconds:.0f} s; {len(open_)} of {len(calm.numbers)} to do"))
        elif why := _lie(code, said, open_, launch.thrown, calm):
            breaches.append(Breach(Outcome.EXIT, why))
    breaches += [Breach(Outcome.EXIT, scene.wrong.pop()) for _ in list(scene.wrong)]
    for words, code, said in launch.others:
        if code or "Traceback" in said:
            breaches.append(Breach(Outcome.EXIT, f"{words} ended with {code}: {_last_line(said)}"))
    return breaches


def _lie(code: int, said: str, open_: list[str], thrown: list[Fault], calm: Calm) -> str:
    """Why an exit code, or what was said with it, is not true; empty where it is."""
    last = _last_line(said)
    allowed = {number for fault in thrown for number in fault.codes}
    if "Traceback" in said or "unexpected" in said:
        return f"exit code {code} with an error that nobody expected: {last}"
    if code in allowed:
        return ""
    if code == 0:
        return f"exit code 0, but {len(open_)} of {len(calm.numbers)} stages are not done" if open_ else ""
    if code == 75 and open_:
        return ""
    name = signal.Signals(-code).name if code < 0 else str(code)
    return f"exit code {name} although it was not sent, with {len(open_)} of {len(calm.numbers)} to do: {last}"


def _passes(record: Record) -> bool:
    """Whether a record says of itself that it is no fact: cut off, or not begun for want of what this machine lacks now."""
    return record.status is Status.TRANSIENT or (record.status is Status.UNSUPPORTED and record.phase == PLAN)


def _last_line(said: str) -> str:
    return next((line.strip()[:200] for line in reversed(said.splitlines()) if line.strip()), "")


def of_end(scene: Scene, calm: Calm, complete: bool) -> list[Breach]:
    """What does not hold once the same command was given until it ended with 0, or as often as it may be."""
    breaches = [] if complete else [Breach(Outcome.INCOMPLETE, "the same command does not come to its end")]
    breaches += [*_orphans(scene, "in the end"), *_leftovers(scene), *_doubled(scene)]
    for place in scene.places:
        breaches += _of_records(scene, place, calm)
    return breaches


def _of_records(scene: Scene, results: Path, calm: Calm) -> list[Breach]:
    """Where the records of a folder are not those of the calm sweep."""
    records, unreadable = _scan(results)
    breaches = [Breach(Outcome.TORN, f"{fault.path}: {fault.reason}") for fault in unreadable if not fault.path.endswith(".unreadable")]
    for path, expected in calm.numbers.items():
        if (record := records.pop(path, None)) is None:
            breaches.append(Breach(Outcome.LOST, f"no {path}"))
        elif record.foreign:
            breaches.append(Breach(Outcome.FOREIGN, f"{path} is of another folder"))
        elif record.status is not Status.OK:
            breaches.append(Breach(Outcome.FACT, f"{path} stays {record.status}"))
        elif (given := numbers(record)) != expected:
            breaches.append(Breach(Outcome.CHANGED, f"{path}: {_difference(expected, given)}"))
        elif record.compress:
            breaches += _other_bytes(scene, record)
    return breaches + [
        Breach(Outcome.DOUBLED, f"{path} beside the record of the same stage") for path in records if not records[path].foreign
    ]


def _difference(expected: Any, given: Any) -> str:
    if isinstance(expected, dict) and isinstance(given, dict):
        name = next((n for n in sorted(expected | given) if expected.get(n) != given.get(n)), "")
        return f"{name}: {_difference(expected.get(name), given.get(name))}"
    return f"{json.dumps(given)[:80]}, calm {json.dumps(expected)[:80]}"


def _other_bytes(scene: Scene, record: Record) -> list[Breach]:
    """Files of an artefact that are not those of its record."""
    assert record.compress
    folder = scene.cache / "artefacts" / record.key
    if not folder.exists():  # a cache may be emptied; the next stage makes it again
        return []
    files = [(folder / file.name, file.sha256) for file in record.compress.files]
    wrong = [path.name for path, sha256 in files if not path.is_file() or hash_file(path) != sha256]
    return [Breach(Outcome.TORN, f"artefact {record.key}: {wrong[0]} is not what its record says")] if wrong else []


def _orphans(scene: Scene, when: str) -> list[Breach]:
    """What lives on some seconds after its launch; it is ended then, so that it is told once and disturbs nothing."""
    deadline = time.monotonic() + _GRACE_S
    while (alive := scene.processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    found = [Breach(Outcome.ORPHAN, f"{when} {process.pid} lives on: {' '.join(process.cmdline())[-80:]}") for process in alive]
    for process in alive:
        process.kill()
    return found


def _leftovers(scene: Scene) -> list[Breach]:
    """Files that finished work does not need: half-written ones, staging folders, checkpoints, locks that name an owner."""
    found = [path for path in scene.tmp.iterdir()]
    for place in scene.places:
        found += [path for path in place.rglob("*") if path.name.endswith(".tmp")]
        found += [path for path in place.glob("*/*/*.unreadable") if not scene.spoilt]
        found += [*place.glob(".slimbench.*"), *(place / ".locks").glob("*")]
    found += [path for path in scene.cache.rglob("*") if path.name.startswith(".") or path.name.endswith(".tmp")]
    found += [*(scene.cache / "checkpoints").glob("*"), *(scene.cache / "partial").glob("*")]
    return [Breach(Outcome.LEFTOVER, str(path.relative_to(scene.root))) for path in found]


def _doubled(scene: Scene) -> list[Breach]:
    """Stages that ran at the same time, or again although their record stood, as the journals tell."""
    if len(scene.places) > 1:  # each folder has records of its own of one stage
        return []
    return [Breach(Outcome.DOUBLED, what) for what in doubled(scene.journals, scene.spoilt)]


@dataclass(frozen=True)
class _Span:
    """A run of a task as a journal tells it.

    Attributes:
        process: Number of the journal.
        began: In seconds since the epoch; `ended`, too.
        first: Line of the journal that tells its start; `last` tells its end.
        status: Of the record; empty where there is none.
    """

    process: int
    task: str
    began: float
    ended: float
    first: int
    last: int
    status: str

    def is_over_before(self, other: _Span) -> bool:
        """Whatever the clock does, the lines of one process are in order."""
        return self.last < other.first if self.process == other.process else self.ended <= other.began

    def holds(self, other: _Span) -> bool:
        """Whether another process was at the same task when the other one began."""
        return self.process != other.process and self.began <= other.began < self.ended


def doubled(launches: list[list[Journal]], spoilt: set[str]) -> list[str]:
    """What journals tell of stages that ran twice, in words. The clocks of one launch agree, or it has one process.

    Args:
        spoilt: Tasks whose record was damaged on purpose, so that they had to run again.
    """
    done: set[str] = set()
    found = []
    for launch in launches:
        spans = [span for number, journal in enumerate(launch) for span in _spans(number, journal)]
        for span in spans:
            others = [other for other in spans if other.task == span.task and other is not span]
            if any(other.holds(span) for other in others):
                found.append(f"{span.task} ran in two processes at the same time")
            stood = span.task in done or any(other.status == Status.OK and other.is_over_before(span) for other in others)
            if stood and span.task not in spoilt:
                found.append(f"{span.task} ran again although its record stood")
        done |= {span.task for span in spans if span.status == Status.OK}
    return list(dict.fromkeys(found))


def _spans(process: int, journal: Journal) -> list[_Span]:
    """The runs that a journal tells of; one without a record ends with its process or the next run of the task."""
    open_: dict[str, tuple[int, float]] = {}
    spans = []
    for number, line in enumerate(journal.lines):
        time_, _, _, task, *status = line.split()
        now = datetime.datetime.fromisoformat(time_).timestamp()
        if task in open_:
            first, began = open_.pop(task)
            spans.append(_Span(process, task, began, now, first, number, status[0] if status else ""))
        if not status:
            open_[task] = number, now
    ended, lines = journal.ended - _SEEN_S, len(journal.lines)
    return [*spans, *(_Span(process, task, began, max(began, ended), first, lines, "") for task, (first, began) in open_.items())]
