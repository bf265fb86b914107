"""Which engine runs which format, on what, by which kernel: from the records, beside what the configuration offers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slimbench.harness.config.engines import catalogue
from slimbench.harness.schema.identity import Status
from slimbench.leaderboard.rows.row import Row

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Path:
    """One engine with one format on one kind of device.

    Attributes:
        kernels: Those of the rows that ended well, most frequent first.
        measured: Number of those rows.
        outcome: `measured`, the reason why no row ended well, or `not measured`.
    """

    engine: str
    format: str
    device: str
    kernels: tuple[str, ...]
    measured: int
    outcome: str


def paths(board: Sequence[Row]) -> list[Path]:
    """Every engine, format and device that the configuration offers or a row names, in that order."""
    offered = [(engine.name, format_, device) for engine in catalogue() for format_ in engine.loaders for device in engine.devices]
    seen = [(row.engine, row.format, row.device) for row in board if row.format]
    wanted = dict.fromkeys([*offered, *sorted(set(seen))])
    return [_path(key, [row for row in board if (row.engine, row.format, row.device) == key]) for key in wanted]


def _path(key: tuple[str, str, str], rows: Sequence[Row]) -> Path:
    good = [row for row in rows if row.status == Status.OK]
    kernels = [row.kernel for row in good if row.kernel]
    reasons = [row.reason or row.status for row in rows if row.status != Status.OK]
    outcome = "measured" if good else reasons[0] if reasons else NOT_MEASURED
    return Path(*key, tuple(sorted(set(kernels), key=lambda name: (-kernels.count(name), name))), len(good), outcome)


def to_markdown(board: Sequence[Row]) -> str:
    """The table as Markdown."""
    from slimbench.leaderboard.tables.format import escape

    lines = ["## Engines and formats", "", "| Engine | Format | Device | Kernels | Rows |", "| --- | --- | --- | --- | --- |"]
    for path in paths(board):
        told = f"{path.measured} measured" if path.measured else path.outcome
        lines.append("| " + " | ".join(map(escape, (path.engine, path.format, path.device, ", ".join(path.kernels), told))) + " |")
    return "\n".join([*lines, ""])
