"""A results folder becomes a board: page, tables and plots. Reads records only, needs no model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from harness.record import Record
from harness.store import Store, StoreError, Unreadable, write_atomically
from leaderboard import engines, scaling
from leaderboard.figures import draw, plottable
from leaderboard.row import Row, clean
from leaderboard.site.page import render
from leaderboard.tables import Table, rows, tables, to_csv, to_json, to_markdown


class BoardError(StoreError):
    """There is no board to build. The message is one line."""


def build(results: Path, out: Path) -> list[Path]:
    """Write the board of a results folder.

    Args:
        results: Folder of records.
        out: Folder that receives the files; made if it is not there.

    Returns:
        The files written: `index.html`, `table.md`, `table.csv`, `table.json`, `pareto.png` and `.svg` of each table, and `sizes.png`
        and `.svg` where several models were measured alike.

    Raises:
        BoardError: The folder holds no record, or `out` cannot be written.
    """
    if not results.is_dir():
        raise BoardError(f"there is no results folder '{results}'; make records with `slimbench run`")
    records, unreadable = Store(results).scan()
    if not records:
        hint = f"; {len(unreadable)} files could not be read, the first: {unreadable[0].path}: {unreadable[0].reason}" if unreadable else ""
        raise BoardError(f"no records in '{results}'{hint}")
    return write(records, unreadable, out)


def write(records: Sequence[Record], unreadable: Sequence[Unreadable], out: Path) -> list[Path]:
    """Write the board of records that are already loaded; arguments and errors as of `build`."""
    if not records:
        raise BoardError("no records")
    try:
        files = {out / name: content for name, content in contents(records, unreadable).items()}
        for path, content in files.items():
            write_atomically(path, content)
    except OSError as error:
        raise BoardError(f"cannot write the board to '{out}': {error.strerror or error}") from error
    return list(files)


def contents(records: Sequence[Record], unreadable: Sequence[Unreadable] = ()) -> dict[str, bytes]:
    """Every file of the board by its name. The same records, in any order, give the same bytes."""
    board = rows(records)
    faults = sorted((clean(fault.path), clean(fault.reason)) for fault in unreadable)
    texts = {
        "index.html": render(board, faults),
        "table.md": "\n".join((to_markdown(board), engines.to_markdown(board))),
        "table.csv": to_csv(board),
        "table.json": to_json(board),
    }
    return {name: text.encode() for name, text in texts.items()} | _plots([t for t in tables(board) if plottable(t)]) | _sizes(board)


def _sizes(board: Sequence[Row]) -> dict[str, bytes]:
    """The plot of decode time against bytes, where several models were measured alike."""
    drawn = scaling.series(board)
    return {f"sizes.{kind}": scaling.draw(drawn, kind) for kind in ("png", "svg")} if drawn else {}


def _plots(plotted: Sequence[Table]) -> dict[str, bytes]:
    """The plots by file name: the first is `pareto`, others are named by model and suite."""
    files: dict[str, bytes] = {}
    for table in plotted:
        row = table.rows[0]
        words = [row.model, row.suite, row.speed, row.device] if files else []
        stem = "-".join(["pareto", *(re.sub(r"[^a-z0-9.]+", "-", word.lower()).strip("-.")[:40] for word in words)])
        while f"{stem}.png" in files:
            stem += "-2"
        files |= {f"{stem}.png": draw(table, "png"), f"{stem}.svg": draw(table, "svg")}
    return files
