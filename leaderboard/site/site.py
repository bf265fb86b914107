"""The whole site: every page by its path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice

from slimbench.leaderboard.figures.plots import Gallery
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.site import apart, cell, coverage, figures, guide, method, model, names, ranking
from slimbench.leaderboard.site.assets import assets
from slimbench.leaderboard.site.board import Board
from slimbench.leaderboard.site.lines import Line, line

FOLDERS = ("cell", "model", "method")

Files = list[tuple[str, bytes]]
_TOGETHER = 100
"""Pages of cells that are made in one go."""


def parts(board: Board, gallery: Gallery) -> Iterator[Callable[[], Files]]:
    """What makes the files of the site but those of `last`, with their paths: independent of each other, the longest work first."""
    lines = {names.cell(row): line(board, row) for row in board.rows}
    yield lambda: _methods(board, lines) + _models(board, lines, "sizes" in gallery.plots)
    yield lambda: _encoded(("data/rows.js", ranking.data(board)))
    left = iter(board.rows)
    while rows := list(islice(left, _TOGETHER)):
        yield partial(_cells, board, rows, lines)
    yield lambda: _encoded(("guide.html", guide.render(board)), ("apart.html", apart.render(board)))
    yield lambda: list(assets().items())


def last(board: Board, beside: Mapping[str, bytes], gallery: Gallery) -> Files:
    """The figures and the ranking: they appear once all that they link to is there.

    Args:
        beside: Tables, plots and figures by their path.
        gallery: What the plots and figures show.
    """
    return _encoded(("figures.html", figures.render(board, beside, gallery)), ("index.html", ranking.index(board, beside)))


def _cells(board: Board, rows: Sequence[Row], lines: Mapping[str, Line]) -> Files:
    return _encoded(*((name, cell.render(board, row, lines[name])) for row in rows for name in [names.cell(row)]))


def _models(board: Board, lines: dict[str, Line], sizes: bool) -> Files:
    pages = ((names.model(name), model.render(board, name, rows, lines, sizes)) for name, rows in model.by_model(board).items())
    return _encoded(*pages, ("models.html", model.index(board)))


def _methods(board: Board, lines: dict[str, Line]) -> Files:
    """The methods of the configuration and those that only records know, and what they cover of the survey."""
    abouts, broken = method.registry()
    used = method.users(board)
    known = {about.name for about in abouts}
    abouts = [*abouts, *(method.About(name) for name in sorted(set(used) - known))]
    pages = [(names.method(about.name), method.render(board, about, used.get(about.name, []), lines)) for about in abouts]
    covered = coverage.render({about.name for about in abouts})
    return _encoded(*pages, ("methods.html", method.index(abouts, broken, used)), ("coverage.html", covered))


def _encoded(*pages: tuple[str, str]) -> Files:
    return [(path, text.encode()) for path, text in pages]
