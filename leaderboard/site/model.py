"""Pages of the models: an index, and for each model its pipelines, set by set, and the same pipelines on other sizes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from slimbench.harness.schema.identity import Status
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.site import names
from slimbench.leaderboard.site.board import Board, plural
from slimbench.leaderboard.site.lines import Line, heads
from slimbench.leaderboard.site.pages import LONGEST_NAME, LONGEST_REMARK, page
from slimbench.leaderboard.tables.columns import COLUMNS, Column
from slimbench.leaderboard.tables.format import EMPTY, decimal, shorten
from slimbench.leaderboard.tables.sides.side import Side
from slimbench.leaderboard.tables.writers import SIDES

LOW_BITS = 5.0
_MOST_SCALED = 200
_SCALED = ("perplexity_delta_percent", "speedup", "decode_tokens_per_s", "weight_bytes")
_CHANGE = decimal(1, signed=True)


def count(parameters: int | None) -> str:
    """A number of parameters for people: `135 M`, `1.7 B`."""
    if parameters is None:
        return EMPTY
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.0f} M"


def index(board: Board) -> str:
    models = [
        {
            "name": name,
            "href": names.model(name),
            "parameters": count(_parameters(rows)),
            "cells": len(rows),
            "ended": sum(row.status == Status.OK for row in rows),
            "best": _best(rows),
        }
        for name, rows in by_model(board).items()
    ]
    return page("models.html.j2", "models.html", "Models", board=board, models=models)


def by_model(board: Board) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in board.rows:
        found[row.model].append(row)
    return found


def render(board: Board, name: str, rows: Sequence[Row], lines: dict[str, Line], sizes: bool) -> str:
    """The page of one model.

    Args:
        rows: Its rows.
        lines: The line of each row by its page.
        sizes: There is a plot over model sizes.
    """
    sections = [
        {**setting, "lines": [lines[names.cell(row)] for row in table.rows], "heads": heads(board, number), "sides": _sides(table.rows)}
        for number, (table, setting) in enumerate(zip(board.tables, board.settings, strict=True))
        if table.rows[0].model == name
    ]
    ended = sum(row.status == Status.OK for row in rows)
    parameters = _parameters(rows)
    parts = [*([f"{count(parameters)} parameters"] if parameters else []), plural(len(rows), "cell"), f"{ended} ended well"]
    return page(
        "model.html.j2",
        names.model(name),
        name,
        name=name,
        summary=", ".join(parts) + ".",
        sections=sections,
        relatives=_relatives(board, name),
        sizes=sizes,
    )


def _sides(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What stands beside the table of a set: bytes of caches, facts found in contexts, work of a token."""
    return [_side(side, known[:_MOST_SCALED]) for side in SIDES if (known := side.shown(rows))]


def _side(side: Side, rows: Sequence[Row]) -> dict[str, Any]:
    header, texts = side.cells(rows)
    shown = [[shorten(name, LONGEST_REMARK), *numbers] for name, *numbers in texts]
    return {"title": side.title, "reading": side.reading, "header": header, "rows": shown}


def _parameters(rows: Sequence[Row]) -> int | None:
    return next((row.parameters for row in rows if row.parameters), None)


def _best(rows: Sequence[Row]) -> dict[str, str] | None:
    """The row of few bits that loses least against its reference."""
    candidates = [
        (row.perplexity_delta_percent, row)
        for row in rows
        if row.status == Status.OK
        and row.perplexity_delta_percent is not None
        and row.effective_bits is not None
        and row.effective_bits < LOW_BITS
    ]
    if not candidates:
        return None
    change, row = min(candidates, key=lambda pair: pair[0])
    return {"href": names.cell(row), "name": shorten(row.label, LONGEST_NAME), "loss": f"{_CHANGE(change)} %"}


def _relatives(board: Board, name: str) -> dict[str, Any] | None:
    """Pipelines of the model beside the same pipelines of other models, smallest first."""
    columns: list[Column] = [column for column in COLUMNS if column.key in _SCALED]
    shown: list[list[str]] = []
    for rows in board.scaling.get(name, []):
        if len(shown) >= _MOST_SCALED:
            break
        for row in sorted(rows, key=lambda r: (r.parameters or 0, r.weight_bytes or 0, r.model)):
            label = shorten(f"{row.pipeline} · {row.engine_label}", LONGEST_REMARK)
            numbers = [column.plus_minus(row) for column in columns]
            shown.append([label, shorten(row.model, LONGEST_NAME), count(row.parameters), *numbers])
    return {"header": ["Pipeline", "Model", "Parameters", *(column.header for column in columns)], "rows": shown} if shown else None
