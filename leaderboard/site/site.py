"""The whole site: every page by its path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from leaderboard.parallel import mapped
from leaderboard.plots import Gallery
from leaderboard.site import cell, coverage, figures, guide, method, model, names, ranking
from leaderboard.site.assets import assets
from leaderboard.site.board import Board
from leaderboard.site.lines import line
from leaderboard.site.ranking import set_facts

FOLDERS = ("cell", "model", "method")


def files(board: Board, beside: Mapping[str, bytes], gallery: Gallery) -> Iterator[tuple[str, bytes]]:
    """Path and content of every file of the site, the ranking last: it appears once all that it links to is there.

    Args:
        beside: Tables, plots and figures by their path.
        gallery: What the plots and figures show.
    """
    yield from assets().items()
    for path, text in _pages(board, beside, gallery):
        yield path, text.encode()


def _pages(board: Board, beside: Mapping[str, bytes], gallery: Gallery) -> Iterator[tuple[str, str]]:
    abouts, broken = method.registry()
    used = method.users(board)
    known = {about.name for about in abouts}
    abouts = [*abouts, *(method.About(name) for name in sorted(set(used) - known))]
    lines = {names.cell(row): line(board, row) for row in board.rows}
    settings = [set_facts(table) for table in board.tables]
    cells = mapped(lambda row: cell.render(board, row, lines[names.cell(row)], settings), board.rows)
    yield from zip(map(names.cell, board.rows), cells, strict=True)
    for name, rows in model.by_model(board).items():
        yield names.model(name), model.render(board, name, rows, lines, "sizes.svg" in beside)
    described = mapped(lambda about: method.render(board, about, used.get(about.name, []), lines), abouts, fewest=len(abouts))
    yield from zip((names.method(about.name) for about in abouts), described, strict=True)
    yield "models.html", model.index(board)
    yield "methods.html", method.index(abouts, broken, used)
    yield "figures.html", figures.render(board, beside, gallery)
    yield "coverage.html", coverage.render({about.name for about in abouts})
    yield "guide.html", guide.render(board)
    yield "data/rows.js", ranking.data(board)
    yield "index.html", ranking.index(board, beside)
