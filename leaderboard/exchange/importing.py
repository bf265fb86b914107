"""Files become records of a results folder: what each is, what is new, and what cannot be read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store
from slimbench.leaderboard.exchange import dataset, lm_eval, optimum_benchmark, parquet
from slimbench.leaderboard.exchange.foreign import Named, Source, Unreadable

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
    for source in sources:
        found = list(_files(source, format))
        if not found:
            yield Report(str(source), Outcome.UNREADABLE, reason="no file of a known kind below it")
        for path in found:
            for read in _read(path, format, named):
                yield _store(path, read, store, replace)


def _store(path: Path, read: Record | str, store: Store, replace: bool) -> Report:
    if isinstance(read, str):
        return Report(str(path), Outcome.UNREADABLE, reason=read)
    there = store.get(read.cell, read.stage, read.hardware)
    if there == read:
        return Report(str(path), Outcome.THERE, read)
    if there and not replace:
        origin = f" (of {there.imported.file})" if there.imported else ""
        return Report(str(path), Outcome.OTHER, read, f"the cell has another record{origin}; give another --pipeline, or --replace it")
    store.put(read)
    return Report(str(path), Outcome.IMPORTED, read)


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
    """A record whose key is that of its cell: by that the board finds it."""
    if isinstance(read, Record) and read.key != read.cell.keys.of(read.stage):
        return "not a record: its key is not that of its cell"
    return read
