"""Files become records of a results folder: what each is, what is new, and what cannot be read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store
from slimbench.leaderboard.exchange import dataset, lm_eval, optimum_benchmark, parquet
from slimbench.leaderboard.exchange.foreign import Named, Source, Unreadable

Task = tuple[Stage, str, str]
AUTO = "auto"
PARQUET = ("parquet", "hf")
_READERS = {lm_eval.TOOL: lm_eval, optimum_benchmark.TOOL: optimum_benchmark}
FORMATS = (AUTO, *PARQUET, *_READERS)


class Outcome(StrEnum):
    IMPORTED = "imported"
    THERE = "there already"
    OTHER = "not imported"
    UNREADABLE = "could not be read"


@dataclass(frozen=True)
class Report:
    """What became of a file, or of one record in it. `reason` says why it was not imported."""

    source: str
    outcome: Outcome
    record: Record | None = None
    reason: str = ""

    @property
    def line(self) -> str:
        cell = f"{self.record.cell.model} · {self.record.cell.pipeline} · {self.record.stage}" if self.record else ""
        return " ".join(": ".join(part for part in (self.outcome, cell, self.source, self.reason) if part).split())


def add(sources: Iterable[Path], store: Store, format: str = AUTO, named: Named = Named(), replace: bool = False) -> Iterator[Report]:  # noqa: B008
    """Put the records of files, and of the files below folders, into a results folder, and report each.

    Args:
        format: One of `FORMATS`; `auto` looks into each file.
        named: Model and pipeline of results of other tools.
        replace: Another record of the same cell gives way; else it stays, and the new one is not imported.

    Raises:
        StoreError: The results folder cannot be written.
    """
    there = {_task(record): record for record in store.scan()[0]}
    for source in sources:
        found = list(_files(source, format))
        if not found:
            yield Report(str(source), Outcome.UNREADABLE, reason="no file of a known kind below it")
        for path in found:
            for read in _read(path, format, named):
                yield _store(path, read, store, there, replace)


def _store(path: Path, read: Record | str, store: Store, there: dict[Task, Record], replace: bool) -> Report:
    if isinstance(read, str):
        return Report(str(path), Outcome.UNREADABLE, reason=read)
    known = there.get(_task(read))
    if known and _content(known) == _content(read):
        return Report(str(path), Outcome.THERE, read)
    if known and (reason := _obstacle(known, read, replace)):
        return Report(str(path), Outcome.OTHER, read, reason)
    if read.foreign:
        store.receive(read)
    else:
        store.put(read)
    there[_task(read)] = read
    return Report(str(path), Outcome.IMPORTED, read)


def _obstacle(known: Record, read: Record, replace: bool) -> str:
    """Why a record cannot stand beside or in place of one of the same stage, key and hardware; empty where it can."""
    if (known.cell.model, known.cell.pipeline) != (read.cell.model, read.cell.pipeline):
        return f"its key is that of {known.cell.model} · {known.cell.pipeline}"
    if not (known.foreign or known.imported):
        return "you measured the cell yourself"
    origin = f" (of {known.imported.file})" if known.imported else ""
    return "" if replace else f"the cell has another record{origin}; give another --pipeline, or --replace it"


def _task(record: Record) -> Task:
    return record.stage, record.key, record.hardware.fingerprint


def _content(record: Record) -> Record:
    """A record without where it was written."""
    return record.model_copy(update={"origin": None, "foreign": False})


def _files(source: Path, format: str) -> Iterator[Path]:
    """The files that a source stands for: itself, or those of known names below it."""
    if not source.is_dir():
        yield source
        return
    if format in (AUTO, *PARQUET):
        if (source / dataset.RECORDS).is_file():
            yield source / dataset.RECORDS
        else:
            yield from sorted(source.rglob("*.parquet"))
    if format in (AUTO, lm_eval.TOOL):
        yield from sorted(source.rglob("results_*.json"))
    if format in (AUTO, optimum_benchmark.TOOL):
        reports = sorted([*source.rglob("benchmark.json"), *source.rglob("benchmark_report.json")])
        yield from (path for path in reports if not optimum_benchmark.is_repeated(path))


def _read(path: Path, format: str, named: Named) -> list[Record | str]:
    """The records of a file, or one line for each that cannot be read."""
    try:
        if format in PARQUET or (format == AUTO and _is_parquet(path)):
            return [_whole(read) for read in parquet.to_records(path)]
        source = Source.read(path)
        readers = [reader for name, reader in _READERS.items() if format == name or (format == AUTO and reader.is_mine(source.data))]
        if not readers:
            raise Unreadable("neither Parquet nor a result file of " + " or ".join(_READERS))
        return [readers[0].read(source, named)]
    except Unreadable as error:
        return [str(error)]


def _is_parquet(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(parquet.MAGIC)) == parquet.MAGIC
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from error


def _whole(read: Record | str) -> Record | str:
    """A record of another results folder, whose key is that of its cell: by that the board finds it."""
    if isinstance(read, str):
        return read
    if read.key != read.cell.keys.of(read.stage):
        return "not a record: its key is not that of its cell"
    return read.model_copy(update={"foreign": True})
