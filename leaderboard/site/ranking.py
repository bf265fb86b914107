"""The ranking: every cell in one table that the browser sorts and filters. Its rows travel as compact JSON in a script."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from slimbench.leaderboard.flags.kinds import Figure, invalidating, spoiling
from slimbench.leaderboard.recommend import memory_bytes
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.site import names
from slimbench.leaderboard.site.board import FASTEST, SMALLEST, Board
from slimbench.leaderboard.site.lines import colour, remarks, simulated
from slimbench.leaderboard.site.pages import LONGEST_NAME, LONGEST_REMARK, page
from slimbench.leaderboard.site.uses import uses
from slimbench.leaderboard.tables.columns import COLUMNS, MARGIN, Column, VerdictColumn, comparable
from slimbench.leaderboard.tables.format import decimal, shorten
from slimbench.leaderboard.tables.tables import ENOUGH

EXTRA = (
    Column("compress_seconds", "Compress\N{NO-BREAK SPACE}s", "Wall time of the compression.", decimal(1)),
    Column("peak_memory_bytes", "Peak MB", "Peak resident memory of the compression, in 10⁶ bytes.", decimal(0, 1e-6)),
)
ALL = (*COLUMNS, *EXTRA)
CELLS = tuple(column for column in ALL if column.format is not str or isinstance(column, VerdictColumn))
"""Columns of numbers and verdicts; other texts are facets."""
_HIDDEN = {
    *("first_divergent", "divergent_share", "accuracy_delta", "accuracy_verdict", "prefill_ms", "roofline_fraction", "disk_bytes"),
    *("compress_seconds", "peak_memory_bytes"),
}
_LOGARITHMIC = {"perplexity", "kl_mean", "prefill_ms", "decode_tokens_per_s", "speedup"}
_REFERENCE, _SIMULATED, _SMALLEST, _FASTEST, _FOREIGN = 1, 2, 4, 8, 16
_CELL, _QUALITY, _DECODE, _MEMORY_FIGURE = 1, 2, 4, 8
_FIGURES = {Figure.QUALITY: _QUALITY, Figure.DECODE: _DECODE, Figure.MEMORY: _MEMORY_FIGURE}
_MEMORY = decimal(1, 1e-6)


def index(board: Board, files: Iterable[str]) -> str:
    """The page; its rows come from `data`.

    Args:
        files: Names of the tables and plots that lie beside it.
    """
    kinds = (("All numbers, unrounded", ".csv .json"), ("Rounded, for people", ".md"), ("Plots for print", ".svg"))
    beside = [name for name in files if "/" not in name]
    named = [(about, [name for name in beside if name.endswith(tuple(endings.split()))]) for about, endings in kinds]
    return page("ranking.html.j2", "index.html", "Ranking", board=board, uses=uses(board), files=named)


def data(board: Board) -> str:
    """A script that defines `BOARD`: texts once, rows as arrays, numbers as they are shown."""
    texts = _Texts()
    rows = [_row(board, row, texts) for row in board.rows]
    first = comparable(board.rows)
    content = {
        "columns": [_column(column, shown=column not in COLUMNS or column in first) for column in CELLS],
        "margin": MARGIN,
        "sets": board.settings,
        "sequence": board.sequence,
        "enough": ENOUGH,
        "rows": rows,
        "texts": list(texts),
    }
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"window.BOARD=JSON.parse('{quoted}');\n"


class _Texts(dict[str, int]):
    """Texts by their number, in the order in which they were first asked for."""

    def __missing__(self, text: str) -> int:
        self[text] = number = len(self)
        return number

    def name(self, text: str | None) -> int | None:
        return self[shorten(text, LONGEST_NAME)] if text else None

    def remark(self, text: str | None) -> int | None:
        return self[shorten(text, LONGEST_REMARK)] if text else None


def _column(column: Column, shown: bool) -> dict[str, Any]:
    return {
        "key": column.key,
        "header": column.header,
        "help": column.help,
        "text": isinstance(column, VerdictColumn),
        "digits": getattr(column.format, "digits", 0),
        "signed": getattr(column.format, "signed", False),
        "rising": column.rising,
        "log": column.key in _LOGARITHMIC,
        "shown": shown and column.key not in _HIDDEN,
    }


def _row(board: Board, row: Row, texts: _Texts) -> list[Any]:
    fronts = board.fronts.get(row.place, ())
    marks = _FOREIGN * row.foreign | _REFERENCE * row.is_reference | _SIMULATED * simulated(row)
    marks |= _SMALLEST * (SMALLEST in fronts) | _FASTEST * (FASTEST in fronts)
    return [
        names.cell_id(row),
        board.table_of[row.place],
        texts.name(row.model),
        texts.name(row.label),
        texts.name(row.family),
        texts[colour(row)],
        texts.name(row.engine_label),
        texts.name(row.kernel),
        texts.name(row.device),
        texts[row.status],
        texts.remark(row.reason),
        [texts.remark(text) for text in remarks(row)],
        row.rank,
        marks,
        texts.name(row.source_precision),
        row.parameters,
        None if (memory := memory_bytes(row)) is None else shown(_MEMORY(memory)),
        texts.name(row.grid),
        row.rank_last,
        _invalid(row),
        *(_number(column, row) for column in CELLS),
    ]


def _invalid(row: Row) -> int:
    """What invalidating flags take away of a row: the cell as a whole, and figures by which it could be chosen."""
    figures = sum(bit for figure, bit in _FIGURES.items() if spoiling(row.flags, figure))
    return _CELL * bool(invalidating(row.flags, ())) | figures


def _number(column: Column, row: Row) -> Any:
    """Nothing, the number, or the number with the bounds of its interval; a verdict, or one with what would resolve it."""
    value = getattr(row, column.key)
    if value is None:
        return None
    if isinstance(column, VerdictColumn):
        return [value, told] if (told := column.interval(row)) else value
    bounds = [getattr(row, name) for name in column.bounds or ()]
    if not bounds or None in bounds:
        return shown(column.format(value))
    return [shown(column.format(v)) for v in (value, *bounds)]


def shown(text: str) -> float | int:
    """The number that a text shows."""
    value = float(text.replace("−", "-"))
    return int(value) if value.is_integer() else value
