"""Records and rows as Parquet. Of a record the whole JSON is kept, so that what is read again is what was written."""

from __future__ import annotations

import io
import json
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, get_args, get_origin

import pyarrow as pa
import pyarrow.parquet as pq

from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import dump, parse
from slimbench.leaderboard.exchange.foreign import Unreadable
from slimbench.leaderboard.rows.clean import clean
from slimbench.leaderboard.rows.row import Row

RECORD = "record"
MAGIC = b"PAR1"
_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
_ROWS_IN_GROUP = 1000

# Flat columns of a record: name, type, description, value.
COLUMNS: tuple[tuple[str, type, str, Callable[[Record], Any]], ...] = (
    ("model", str, "Dense source checkpoint.", lambda r: r.cell.model),
    ("pipeline", str, "Methods applied one after the other.", lambda r: r.cell.pipeline),
    ("family", str, "Branch of the survey.", lambda r: r.cell.family),
    ("stage", str, "compress, quality or speed.", lambda r: r.stage.value),
    ("status", str, "How the stage ended.", lambda r: r.status.value),
    ("key", str, "Content key of the stage.", lambda r: r.key),
    ("engine", str, "What loaded and ran the artefact.", lambda r: r.cell.engine),
    ("device", str, "Kind of device.", lambda r: r.cell.device),
    ("dtype", str, "Storage and compute type of the dense source.", lambda r: r.cell.dtype),
    ("suite", str, "What quality was measured on.", lambda r: r.cell.suite),
    ("speed_protocol", str, "How speed was measured.", lambda r: r.cell.speed),
    ("temperature", float, "At which tokens were drawn while speed was measured.", lambda r: r.speed.temperature if r.speed else None),
    ("seed", int, "Seed of the cell.", lambda r: r.cell.seed),
    ("started", str, "When the stage began, ISO 8601; empty where it is not known.", lambda r: r.started),
    ("wall_seconds", float, "How long it took.", lambda r: r.wall_seconds),
    ("imported", str, "The tool that measured it, where it was not slimbench.", lambda r: r.imported.label if r.imported else None),
    ("disk_bytes", int, "Bytes of the artefact's files.", lambda r: r.compress.disk_bytes if r.compress else None),
    ("weight_bytes", int, "Bytes of the loaded tensors.", lambda r: _weight_bytes(r)),
    (
        "perplexity",
        float,
        "Of the first corpus.",
        lambda r: r.quality.perplexity[0].perplexity if r.quality and r.quality.perplexity else None,
    ),
    ("accuracy", float, "Mean over the zero-shot tasks.", lambda r: _accuracy(r)),
    ("prefill_ms", float, "Median of the first speed point.", lambda r: _median(r, "prefill_ms")),
    ("decode_ms", float, "Median step of the first speed point.", lambda r: _median(r, "decode_ms")),
)


def of_records(records: Iterable[Record]) -> bytes:
    """A Parquet file with a row for each record: `COLUMNS`, and the record's JSON as the results folder keeps it."""
    kept = list(records)
    schema = pa.schema([*((name, _ARROW[kind]) for name, kind, _, _ in COLUMNS), (RECORD, pa.string())])
    columns: dict[str, list[Any]] = {name: [clean(value(record)) for record in kept] for name, _, _, value in COLUMNS}
    columns[RECORD] = [dump(record).decode() for record in kept]
    return _file(pa.table(columns, schema=schema))


def to_records(path: Path) -> list[Record | str]:
    """What `of_records` wrote; for a row that is no record one line that says why.

    Raises:
        Unreadable: It is no Parquet file, or has no column of records.
    """
    try:
        file = pq.ParquetFile(path)
        if RECORD not in file.schema_arrow.names:
            raise Unreadable(f"it has no column '{RECORD}'")
        texts = file.read(columns=[RECORD]).column(RECORD).to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise Unreadable(f"not a Parquet file that can be read: {' '.join(str(error).split())}") from error
    return [parse(text.encode()) if isinstance(text, str) else f"not a record: a {type(text).__name__}" for text in texts]


def of_rows(board: Sequence[Row]) -> bytes:
    """A Parquet file with a row for each row of the board: its fields by name; mappings and lists of mappings as JSON."""
    kinds = {name: _kind(field.annotation) for name, field in Row.model_fields.items()}
    data = [row.model_dump(mode="json") for row in board]
    columns = {
        name: [row[name] if kind is not None or row[name] is None else json.dumps(row[name], ensure_ascii=False) for row in data]
        for name, kind in kinds.items()
    }
    return _file(pa.table(columns, schema=pa.schema([(name, kind or pa.string()) for name, kind in kinds.items()])))


def _kind(annotation: Any) -> Any:
    """The Arrow type of a field; None where only JSON can hold it."""
    if get_origin(annotation) in (types.UnionType,):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    if annotation == list[str]:
        return pa.list_(pa.string())
    return _ARROW.get(annotation) if isinstance(annotation, type) else None


def _file(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd", row_group_size=_ROWS_IN_GROUP)
    return out.getvalue()


def _weight_bytes(record: Record) -> int | None:
    result = record.quality or record.speed
    return result.evidence.weight_bytes if result and result.evidence else None


def _accuracy(record: Record) -> float | None:
    return fmean(task.accuracy for task in record.quality.zeroshot) if record.quality and record.quality.zeroshot else None


def _median(record: Record, name: str) -> float | None:
    samples = getattr(record.speed.points[0].candidate, name) if record.speed and record.speed.points else []
    return median(samples) if samples else None
