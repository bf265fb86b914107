"""A results folder becomes a board: site, tables and plots. Reads records only, needs no model."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from harness.record import Record
from harness.store import Store, StoreError, Unreadable
from leaderboard import engines, scaling
from leaderboard.figures import draw, plottable
from leaderboard.parallel import mapped
from leaderboard.reading import Reader
from leaderboard.row import Row
from leaderboard.site.board import Board
from leaderboard.site.site import FOLDERS, files
from leaderboard.tables import Table, to_csv, to_json, to_markdown

KINDS: tuple[Literal["png", "svg"], ...] = ("png", "svg")
MOST_PLOTTED, MOST_LINES, MOST_POINTS = 3, 8, 10
MANY = 12
"""Above so many tables only the fullest is plotted for print: a plot takes as long as hundreds of pages, and the site draws them all."""


class BoardError(StoreError):
    """There is no board to build. The message is one line."""


def build(results: Path, out: Path) -> list[Path]:
    """Write the board of a results folder.

    Args:
        results: Folder of records.
        out: Folder that receives the files; made if it is not there.

    Returns:
        The files written: `index.html` and the pages, scripts and styles that it leads to, `table.md`, `table.csv`, `table.json`,
        `pareto.png` and `.svg` of the fullest tables, and `sizes.png` and `.svg` where several models were measured alike.

    Raises:
        BoardError: The folder holds no record, or `out` cannot be written.
    """
    if not results.is_dir():
        raise BoardError(f"there is no results folder '{results}'; make records with `slimbench run`")
    with _no_garbage():
        records, unreadable = Store(results).scan(Reader())
        if not records:
            hint = (
                f"; {len(unreadable)} files could not be read, the first: {unreadable[0].path}: {unreadable[0].reason}"
                if unreadable
                else ""
            )
            raise BoardError(f"no records in '{results}'{hint}")
        return write(records, unreadable, out)


def write(records: Sequence[Record], unreadable: Sequence[Unreadable], out: Path) -> list[Path]:
    """Write the board of records that are already loaded; arguments and errors as of `build`.

    Pages of an older board in the same folder that no longer belong to it are removed, once the new one is whole.
    """
    if not records:
        raise BoardError("no records")
    written: list[Path] = []
    try:
        with _no_garbage():
            for name, content in contents(records, unreadable):
                written.append(out / name)
                _place(out / name, content)
        _sweep(out, set(written))
    except OSError as error:
        raise BoardError(f"cannot write the board to '{out}': {error.strerror or error}") from error
    return written


def contents(records: Sequence[Record], unreadable: Sequence[Unreadable] = ()) -> Iterator[tuple[str, bytes]]:
    """Path and content of every file of the board. The same records, in any order, give the same bytes."""
    board = Board.of(records, unreadable)
    beside: dict[str, Callable[[], bytes]] = {
        "table.md": lambda: "\n".join((to_markdown(board.rows), engines.to_markdown(board.rows))).encode(),
        "table.csv": lambda: to_csv(board.rows).encode(),
        "table.json": lambda: to_json(board.rows).encode(),
        **_plots([t for t in board.tables if plottable(t)]),
        **_sizes(board.rows),
    }
    yield from zip(beside, mapped(lambda made: made(), list(beside.values()), fewest=2), strict=True)
    yield from files(board, list(beside))


@contextmanager
def _no_garbage() -> Iterator[None]:
    """No search for cycles meanwhile: a board is millions of small objects without any, and the search takes longer than the board."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _place(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all. It can be made again, so it is not forced to the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
    try:
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _sweep(out: Path, written: set[Path]) -> None:
    """Remove the pages of an older board."""
    for folder in FOLDERS:
        for path in (out / folder).glob("*.html"):
            if path not in written:
                path.unlink()


def _sizes(board: Sequence[Row]) -> dict[str, Callable[[], bytes]]:
    """The plot of decode time against bytes, where several models were measured alike: of as many lines and models as can be read."""
    drawn = [replace(line, points=_spread(line.points)) for line in scaling.series(board)[:MOST_LINES]]
    return {f"sizes.{kind}": partial(scaling.draw, drawn, kind) for kind in KINDS} if drawn else {}


def _spread(points: tuple[Any, ...]) -> tuple[Any, ...]:
    """At most `MOST_POINTS` of the points, both ends among them."""
    last, kept = len(points) - 1, min(len(points), MOST_POINTS) - 1
    return tuple(points[round(number * last / kept)] for number in range(kept + 1)) if kept else points


def _plots(plotted: Sequence[Table]) -> dict[str, Callable[[], bytes]]:
    """The plots of the fullest tables by file name: the first is `pareto`, others are named by model and suite."""
    plots: dict[str, Callable[[], bytes]] = {}
    measured = [sum(row.perplexity is not None for row in table.rows) for table in plotted]
    fullest = sorted(range(len(plotted)), key=lambda number: (-measured[number], number))
    fullest = fullest[: MOST_PLOTTED if len(plotted) <= MANY else 1]
    for table in (plotted[number] for number in sorted(fullest)):
        row = table.rows[0]
        words = [row.model, row.suite, row.speed, row.device] if plots else []
        stem = "-".join(["pareto", *(re.sub(r"[^a-z0-9.]+", "-", word.lower()).strip("-.")[:40] for word in words)])
        while f"{stem}.png" in plots:
            stem += "-2"
        plots |= {f"{stem}.{kind}": partial(draw, table, kind) for kind in KINDS}
    return plots
