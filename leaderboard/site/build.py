"""A results folder becomes a board: site, tables and plots. Reads records only, needs no model."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store, StoreError, Unreadable
from slimbench.leaderboard.figures import catalogue
from slimbench.leaderboard.figures.canvas import Plot
from slimbench.leaderboard.figures.drawing import KINDS
from slimbench.leaderboard.figures.plots import FIGURES, STEMS, gallery
from slimbench.leaderboard.rows.reading import lean
from slimbench.leaderboard.site.board import Board
from slimbench.leaderboard.site.site import FOLDERS, Files, last, parts
from slimbench.leaderboard.tables import engines
from slimbench.leaderboard.tables.writers import to_csv, to_json, to_markdown
from slimbench.util.files import write_atomically
from slimbench.util.parallel import mapped


class BoardError(StoreError):
    """There is no board to build. The message is one line."""


def build(results: Path, out: Path, figures: bool = True) -> list[Path]:
    """Write the board of a results folder.

    Args:
        results: Folder of records.
        out: Folder that receives the files; made if it is not there.
        figures: Draw the catalogue of figures, unless there are very many tables.

    Returns:
        The files written: `index.html` and the pages, scripts and styles that it leads to, `table.md`, `table.csv`, `table.json`,
        and as PNG, SVG and PDF `pareto` of the tables of most evidence, `sizes` where several models were measured alike, and `figures/`.

    Raises:
        BoardError: The folder holds no record, or `out` cannot be written.
    """
    if not results.is_dir():
        raise BoardError(f"there is no results folder '{results}'; make records with `slimbench run`")
    with _no_garbage():
        records, unreadable = Store(results).scan(lean)
        if not records:
            hint = (
                f"; {len(unreadable)} files could not be read, the first: {unreadable[0].path}: {unreadable[0].reason}"
                if unreadable
                else ""
            )
            raise BoardError(f"no records in '{results}'{hint}")
        return write(records, unreadable, out, figures)


def write(records: Sequence[Record], unreadable: Sequence[Unreadable], out: Path, figures: bool = True) -> list[Path]:
    """Write the board of records that are already loaded; arguments and errors as of `build`.

    Pages, plots and figures of an older board in the same folder that no longer belong to it are removed, once the new one is whole.
    """
    if not records:
        raise BoardError("no records")
    try:
        with _no_garbage():
            written = [out / name for name, _ in _made(records, unreadable, figures, partial(_placed, out))]
        _sweep(out, set(written))
    except OSError as error:
        raise BoardError(f"cannot write the board to '{out}': {error.strerror or error}") from error
    return written


def contents(records: Sequence[Record], unreadable: Sequence[Unreadable] = (), figures: bool = True) -> Iterator[tuple[str, bytes]]:
    """Path and content of every file of the board. The same records, in any order, give the same bytes."""
    return _made(records, unreadable, figures, lambda files: files)


def _made(
    records: Sequence[Record], unreadable: Sequence[Unreadable], figures: bool, finish: Callable[[Files], Files]
) -> Iterator[tuple[str, bytes]]:
    """What `finish` makes of the files, in the process that has them; of drawn ones it has to leave the content."""
    board = Board.of(records, unreadable)
    planned = gallery(board, figures)
    drawings: list[Callable[[], Files]] = [partial(_drawn, path, plot) for path, plot in planned.plots.items()]
    own = [*drawings, *_tables(board)]
    beside: dict[str, bytes] = {}
    for number, made in enumerate(mapped(lambda work: finish(work()), [*own, *parts(board, planned)], fewest=2, together=1)):
        if number < len(own):
            beside |= made
        yield from made
    yield from finish(last(board, beside, planned))


def _drawn(path: str, plot: Plot) -> Files:
    return [(f"{path}.{kind}", content) for kind, content in plot.draw_all().items()]


def _tables(board: Board) -> Iterator[Callable[[], Files]]:
    yield lambda: [("table.md", "\n".join((to_markdown(board.rows), engines.to_markdown(board.rows))).encode())]
    yield lambda: [("table.csv", to_csv(board.rows).encode())]
    yield lambda: [("table.json", to_json(board.rows).encode())]


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


def _placed(out: Path, files: Files) -> Files:
    """Write files, and forget the content of those that no page looks into."""
    for name, content in files:
        _place(out / name, content)
    return [(name, content if name.endswith(".svg") else b"") for name, content in files]


def _place(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all. It can be made again, so it is not forced to the disk."""
    write_atomically(path, content, durable=False)


def _sweep(out: Path, written: set[Path]) -> None:
    """Remove the pages, plots and figures of an older board, by the names that only a board gives."""
    stems = [*STEMS, *(f"{FIGURES}/{name}-*" for name in catalogue.names())]
    names = [f"{folder}/*.html" for folder in FOLDERS] + [f"{stem}.{kind}" for stem in stems for kind in KINDS]
    for path in [path for name in names for path in out.glob(name)]:
        if path not in written:
            path.unlink(missing_ok=True)
