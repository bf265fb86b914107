"""Rows as the static tables of model and method pages show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from leaderboard.figures import FAMILIES, family_of
from leaderboard.row import Row
from leaderboard.site import names
from leaderboard.site.board import Board, triple
from leaderboard.site.pages import LONGEST_NAME, LONGEST_REMARK
from leaderboard.tables import COLUMNS, EMPTY, seed_spread, shorten

SHOWN = tuple(column for column in COLUMNS if column.key not in ("prefill_ms", "roofline_fraction", "disk_bytes"))
"""Columns of the static tables; the pages of the cells have them all."""


@dataclass(frozen=True)
class Number:
    """A number of a table: what it sorts by, what it says, and its interval."""

    sort: float | None
    value: str
    interval: str


@dataclass(frozen=True)
class Line:
    """A row of a static table."""

    row: Row
    href: str
    name: str
    about: str
    family: str
    fronts: Sequence[str]
    numbers: Sequence[Number]
    labels: Sequence[str]
    remarks: Sequence[str]

    @property
    def empty(self) -> bool:
        return all(number.value == EMPTY for number in self.numbers)


def line(board: Board, row: Row) -> Line:
    about = [row.family, row.engine_label, *([row.kernel] if row.kernel else [])]
    seeds = seed_spread(row)
    return Line(
        row=row,
        href=names.cell(row),
        name=shorten(row.label, LONGEST_NAME),
        about=shorten(" · ".join(about), LONGEST_NAME),
        family=colour(row),
        fronts=board.fronts.get(triple(row.keys), ()),
        numbers=[Number(getattr(row, column.key), column.value(row), column.interval(row)) for column in SHOWN],
        labels=["simulated"] if simulated(row) else [],
        remarks=[shorten(text, LONGEST_REMARK) for text in [*row.flags, *([f"Perplexity {seeds}"] if seeds else [])]],
    )


def colour(row: Row) -> str:
    """The branch under whose colour a row is drawn."""
    return family if (family := family_of(row)) in FAMILIES else "other"


def simulated(row: Row) -> bool:
    return any(flag.startswith("simulated") for flag in row.flags)
