"""Rows as the static tables of model and method pages show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from markupsafe import Markup, escape

from slimbench.leaderboard.figures import FAMILIES, family_of
from slimbench.leaderboard.flags.kinds import folded, labelled
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.site import names
from slimbench.leaderboard.site.board import Board
from slimbench.leaderboard.site.pages import LONGEST_NAME, LONGEST_REMARK
from slimbench.leaderboard.tables.columns import Column, rank_of, seed_spread
from slimbench.leaderboard.tables.format import shorten

_DETAILS = frozenset({"first_divergent", "prefill_ms", "roofline_fraction", "disk_bytes"})
"""Columns that the static tables leave to the pages of the cells."""


def heads(board: Board, table: int) -> Markup:
    """The headings of a static table of rows of that table of the board."""
    return Markup("\n").join(
        Markup('<th scope="col" class="n" title="{}"{}>{}</th>').format(column.help, Markup(" data-rising" * column.rising), column.header)
        for column in _shown(board, table)
    )


def _shown(board: Board, table: int) -> list[Column]:
    return [column for column in board.columns[table] if column.key not in _DETAILS]


@dataclass(frozen=True)
class Line:
    """A row of a static table."""

    row: Row
    columns: Sequence[Column]
    href: str
    name: str
    about: str
    family: str
    fronts: Sequence[str]
    labels: Sequence[str]
    remarks: Sequence[str]

    @property
    def rank(self) -> str:
        return rank_of(self.row)

    @cached_property
    def numbers(self) -> Markup:
        """Its numbers as cells of a table, each with its interval and what it sorts by; made once for all pages."""
        return Markup("\n").join(_number(column, self.row) for column in self.columns)


def line(board: Board, row: Row) -> Line:
    about = [row.family, row.engine_label, *([row.kernel] if row.kernel else [])]
    return Line(
        row=row,
        columns=_shown(board, board.table_of[row.place]),
        href=names.cell(row),
        name=shorten(row.label, LONGEST_NAME),
        about=shorten(" · ".join(about), LONGEST_NAME),
        family=colour(row),
        fronts=board.fronts.get(row.place, ()),
        labels=["simulated"] * simulated(row) + ["foreign"] * row.foreign,
        remarks=[shorten(text, LONGEST_REMARK) for text in remarks(row)],
    )


def remarks(row: Row) -> list[str]:
    """What a reader of a table must know about a row, noise of the machine in one line: the page of its cell has it all."""
    spread = seed_spread(row)
    return [*map(labelled, folded(row.flags)), *([f"Perplexity {spread}"] if spread else [])]


def _number(column: Column, row: Row) -> Markup:
    order, interval = getattr(row, column.key), column.interval(row)
    small = f"<small>{escape(interval)}</small>" if interval else ""
    return Markup(f'<td class="n" data-order="{"" if order is None else escape(order)}">{escape(column.value(row))}{small}</td>')


def colour(row: Row) -> str:
    """The branch under whose colour a row is drawn."""
    return family if (family := family_of(row)) in FAMILIES else "other"


def simulated(row: Row) -> bool:
    return any(flag.startswith("simulated") for flag in row.flags)
