"""Where the time of a step went, on the page of its cell."""

from __future__ import annotations

from dataclasses import dataclass

from slimbench.harness.schema.record import Record
from slimbench.leaderboard.explain.account import accounts, told
from slimbench.leaderboard.explain.table import COLUMNS, FORECASTS, cells, foretold
from slimbench.leaderboard.rows.index import Index
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.site.pages import LONGEST_REMARK
from slimbench.leaderboard.tables.format import shorten


@dataclass(frozen=True)
class Table:
    """A table with its heads."""

    title: str
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Shown:
    """One kind of step: sentences, and tables of its parts and of other settings."""

    title: str
    said: list[str]
    tables: list[Table]


def parts(row: Row, record: Record | None, index: Index) -> list[Shown]:
    """Of a decode step and of a prefill; nothing without a ledger."""
    return [
        Shown(
            f"One {account.step}",
            [shorten(text, LONGEST_REMARK) for text in told(account)],
            [
                Table(f"{title} of one {account.step}", list(heads.values()), [list(line.values()) for line in lines])
                for title, heads, lines in (
                    ("Parts", COLUMNS, cells(account)),
                    ("Other settings", FORECASTS, foretold(account)),
                )
                if lines
            ],
        )
        for account in accounts(row, record, index)
    ]
