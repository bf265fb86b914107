"""Tables that stand beside the main one, for rows that have more to tell than it has columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.tables.columns import Column, filled


@dataclass(frozen=True)
class Side:
    """A table beside the main one.

    Attributes:
        reading: How to read it.
        columns: Its columns, by the rows that it shows.
        belongs: Whether a row has something to tell; references may have, but do not make a table alone.
    """

    title: str
    reading: str
    columns: Callable[[Sequence[Row]], Sequence[Column]]
    belongs: Callable[[Row], bool]

    def shown(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that belong to it; none where only references do."""
        known = [row for row in rows if self.belongs(row)]
        return known if any(not row.is_reference for row in known) else []

    def cells(self, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
        """Heads and texts of the table of rows that are `shown`, without columns that none of them fills."""
        columns = filled(self.columns(rows), rows)
        return ["Pipeline", *(column.header for column in columns)], [[row.label, *(c.plus_minus(row) for c in columns)] for row in rows]
