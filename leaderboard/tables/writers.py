"""Tables as JSON, CSV, Markdown and for the terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pydantic_core
from pydantic import BaseModel

from slimbench.harness.schema.identity import Status
from slimbench.leaderboard.rows.row import Row

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from slimbench.leaderboard.tables.columns import LEAST_FIRST, NAME_KERNEL_AND_NOTES, READING, Column, comparable, notes_of, rank_of
from slimbench.leaderboard.tables.format import escape, shorten
from slimbench.leaderboard.tables.resolution import anchors, resolution
from slimbench.leaderboard.tables.sides import cache, contexts, work
from slimbench.leaderboard.tables.sides.side import Side
from slimbench.leaderboard.tables.tables import Table, tables
from slimbench.util.text import csv_text

SIDES = (cache.TABLE, contexts.TABLE, work.TABLE)
"""What stands below a table, where its rows have it."""
_AS_JSON = json.JSONEncoder(ensure_ascii=False).encode


def to_json(board: Sequence[Row]) -> str:
    """A JSON array with one object for each row; its keys are the fields of `Row`. Null for unknown, never NaN."""
    return pydantic_core.to_json(board, indent=1, inf_nan_mode="null").decode() + "\n"


def to_csv(board: Sequence[Row]) -> str:
    """One line for each row, one column for each key; empty for unknown, JSON for lists and mappings.

    A text that a spreadsheet would run as a formula gets a leading apostrophe.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(Row.model_fields)
    writer.writerows([csv_value(getattr(row, key)) for key in Row.model_fields] for row in board)
    return out.getvalue()


def csv_value(value: Any) -> Any:
    """A value as a cell of a CSV file."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, (dict, list)):
        return _AS_JSON(value)
    return csv_text(value) if isinstance(value, str) else value


def to_markdown(board: Sequence[Row]) -> str:
    """A section with one table for each group of comparable rows, and how to read them."""
    reading = "\n\n".join(map(escape, READING))
    return "\n".join([*(_markdown_table(table) for table in tables(board)), reading, ""])


def _markdown_table(table: Table) -> str:
    columns = comparable(table.rows)
    cells = [["#", "Pipeline", "Engine and kernel", *(c.header for c in columns), "Status and flags"]]
    cells.append(["--:", "---", "---", *("--:" for _ in columns), "---"])
    for row in table.rows:
        notes = "; ".join(notes_of(row))
        names = [rank_of(row), escape(row.label), escape(row.path_label)]
        cells.append([*names, *(escape(c.plus_minus(row)) if c.format is str else c.plus_minus(row) for c in columns), escape(notes)])
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    said = [line for text in (*anchors(table.rows), *resolution(table.rows)) for line in ("", escape(text))]
    return "\n".join(
        [
            f"## {escape(table.title)}",
            "",
            escape(table.setting),
            *said,
            "",
            *lines,
            *(line for side in SIDES for line in _markdown_side(side, table)),
            "",
        ]
    )


def _markdown_side(side: Side, table: Table) -> list[str]:
    rows = side.shown(table.rows)
    if not rows:
        return []
    heads, texts = side.cells(rows)
    lines = [heads, ["---", *("--:" for _ in heads[1:])], *([escape(name), *numbers] for name, *numbers in texts)]
    return ["", f"### {side.title}", "", side.reading, "", *("| " + " | ".join(line) + " |" for line in lines)]


def to_terminal(board: Sequence[Row]) -> RenderableType:
    """The tables as something rich can print; notes are numbered and stand below their table."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    for table in tables(board):
        numbers: dict[str, int] = {}
        for row in table.rows:
            for note in notes_of(row):
                numbers.setdefault(note, len(numbers) + 1)
        notes = [Text(f"{number:>3}  {shorten(note, 300)}", style="dim") for note, number in numbers.items()]
        parts += [_Fitted(table, numbers), *notes, Text(""), *(part for side in SIDES for part in _terminal_side(side, table))]
    return Group(*parts, Text("\n".join(READING), style="dim"))


def _terminal_side(side: Side, table: Table) -> list[RenderableType]:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    rows = side.shown(table.rows)
    if not rows:
        return []
    heads, texts = side.cells(rows)
    printed = RichTable(title=Text(side.title), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    printed.add_column(heads[0], overflow="fold", min_width=12)
    for head in heads[1:]:
        printed.add_column(head, justify="right")
    for name, *numbers in texts:
        printed.add_row(Text(shorten(name, 60)), *map(Text, numbers))
    return [printed, Text(side.reading, style="dim"), Text("")]


@dataclass(frozen=True)
class _Fitted:
    """A table that leaves out lesser ones on a narrow terminal."""

    table: Table
    numbers: dict[str, int]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = comparable(self.table.rows)
        texts = {c.key: [c.header, *(c.plus_minus(row) for row in self.table.rows)] for c in columns}
        parts = {c.key: [word for text in texts[c.key] for word in (text.split(" ") if c.wraps else [text])] for c in columns}
        widths = {key: 2 + max(map(len, parts[key])) for key in texts}
        for key in LEAST_FIRST:
            if sum(widths.values()) + NAME_KERNEL_AND_NOTES > options.max_width:
                widths.pop(key, None)
        yield _terminal_table(self.table, self.numbers, [c for c in columns if c.key in widths])


def _terminal_table(table: Table, numbers: dict[str, int], columns: Sequence[Column]) -> RenderableType:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    printed = RichTable(
        title=Text(table.title, style="bold"),
        caption=Text("\n".join([table.setting, *anchors(table.rows), *resolution(table.rows)])),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
        collapse_padding=True,
    )
    printed.add_column("#", justify="right", no_wrap=True)
    printed.add_column("Pipeline", overflow="fold", min_width=12)
    for column in columns:
        printed.add_column(column.header, justify="right", no_wrap=not column.wraps)
    kernels = any(row.kernel for row in table.rows)
    if kernels:
        printed.add_column("Kernel", overflow="fold", min_width=12)
    printed.add_column("Notes", overflow="fold", min_width=10)
    for row in table.rows:
        name = shorten(row.label, 60) + (f" · {shorten(row.engine_label, 40)}" if table.engines_differ else "")
        marks = " ".join(str(numbers[note]) for note in notes_of(row))
        notes = " ".join(([] if row.status == Status.OK else [row.status]) + ([f"[{marks}]"] if marks else []))
        kernel = [Text(shorten(row.kernel or "", 40))] if kernels else []
        style = "bold" if row.is_reference else "" if row.status == Status.OK else "dim"
        printed.add_row(Text(rank_of(row)), Text(name), *(Text(c.plus_minus(row)) for c in columns), *kernel, Text(notes), style=style)
    return printed
