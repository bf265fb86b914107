"""Rows become tables for people and programs: JSON, CSV, Markdown and the terminal. Pure functions of the rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from slimbench.harness.schema.identity import Status
from slimbench.leaderboard.flags.kinds import competes
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import INCOMPLETE

Axis = Literal["weight_bytes", "decode_tokens_per_s"]
ENOUGH = 5
"""A table of fewer rows never stands before one that has as many, however finely its rows were measured."""


@dataclass(frozen=True)
class Table:
    """Rows that may be compared: one model, suite, speed protocol, device and hardware."""

    rows: list[Row]
    variant: str = ""

    @property
    def title(self) -> str:
        return f"{self.rows[0].model} · {suite_of(self.rows[0])}{self.variant}"

    @property
    def setting(self) -> str:
        """Where and how it was measured, in one line."""
        row = self.rows[0]
        points = sorted({r.speed_point for r in self.rows if r.speed_point})
        speed = f"speed {row.speed}" + (f" ({points[0]})" if points else "")
        return " · ".join([*([] if self.engines_differ else [row.engine_label]), row.device, row.hardware, speed])

    @property
    def engines_differ(self) -> bool:
        return len({row.engine_label for row in self.rows}) > 1

    @property
    def reference(self) -> Row | None:
        """The reference, if any of its figures was measured."""
        return next((row for row in self.rows if row.is_reference and (row.perplexity or row.decode_tokens_per_s)), None)


def tables(board: Iterable[Row]) -> list[Table]:
    """Split the rows so that no column mixes two protocols or machines; equal titles get the hash of their protocol."""
    comparable: dict[tuple[str, ...], list[Row]] = {}
    for row in board:
        comparable.setdefault(row.table_key, []).append(row)
    groups = list(comparable.values())
    named = [(group[0].model, suite_of(group[0])) for group in groups]
    protocols = {name: {group[0].suite_protocol for group, n in zip(groups, named, strict=True) if n == name} for name in named}
    return [
        Table(group, f" (protocol {group[0].suite_protocol})" if len(protocols[name]) > 1 else "")
        for group, name in zip(groups, named, strict=True)
    ]


def suite_of(row: Row) -> str:
    """The suite and what of it is the user's own: `quick, windows=4`."""
    return f"{row.suite}, {row.suite_changes}" if row.suite_changes else row.suite


def titles(found: Sequence[Table]) -> list[str]:
    """The titles of tables, with what tells them apart where several are called the same: hardware, device, speed, its protocol."""
    names = [table.title for table in found]
    for facet in ("{0.hardware}", "{0.device}", "speed {0.speed}", "speed protocol {0.speed_protocol}"):
        texts = [facet.format(table.rows[0]) for table in found]
        kinds: dict[str, set[str]] = defaultdict(set)
        for name, text in zip(names, texts, strict=True):
            kinds[name].add(text)
        names = [f"{name} · {text}" if len(kinds[name]) > 1 else name for name, text in zip(names, texts, strict=True)]
    return names


def pareto(table: Sequence[Row], axis: Axis) -> list[Row]:
    """The rows that no other beats in quality and in `axis` at once: fewest bytes, wherever they are kept, or most tokens per second.

    Quality is the perplexity above the reference, which is that of the same engine; where no row has one, the perplexity. Only rows that
    ended well take part, and whose figures no flag takes away; foreign ones only where there are no others. Sorted from the best on.
    """
    sign, cost_field = (-1, axis) if axis == "decode_tokens_per_s" else (1, "held_bytes")
    quality = quality_field(table)
    foreign_too = all(row.foreign for row in table)
    points = [
        (getattr(row, quality), sign * getattr(row, cost_field), row)
        for row in table
        if _competes(row, quality, axis) and (foreign_too or not row.foreign)
    ]
    front: list[Row] = []
    best = float("inf")
    for _, cost, row in sorted(points, key=lambda p: p[:2]):
        if cost < best:
            front.append(row)
            best = cost
    return front


def evidence(rows: Iterable[Row]) -> tuple[bool, float, float, int]:
    """How much the rows of a table say. Of several tables the greatest stands first, and answers where one must.

    Whether rows are enough to choose from; then the windows and the items that the median row was measured on, as these decide what
    differences are seen; then the rows. Only rows that ended well and have a perplexity count.
    """
    finished = [row for row in rows if row.status == Status.OK and row.perplexity is not None]
    windows, items = ([getattr(row, name) or 0 for row in finished] for name in ("perplexity_windows", "accuracy_items"))
    return len(finished) >= ENOUGH, median(windows or [0]), median(items or [0]), len(finished)


def quality_field(rows: Sequence[Row]) -> Literal["loss_percent", "perplexity"]:
    """The field by which the quality of rows is told: paired with the reference where any row is."""
    return "perplexity" if all(row.perplexity_delta_percent is None for row in rows) else "loss_percent"


def _competes(row: Row, quality: str, axis: Axis) -> bool:
    measured = getattr(row, quality) is not None and getattr(row, axis) is not None
    return measured and row.status in (Status.OK, INCOMPLETE) and competes(row.flags, "perplexity", axis)
