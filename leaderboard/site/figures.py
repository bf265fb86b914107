"""The page of the figures: every one that was drawn of these records, table by table, with words for those who cannot see it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from slimbench.leaderboard.figures import catalogue
from slimbench.leaderboard.figures.canvas import Plot
from slimbench.leaderboard.figures.drawing import KINDS
from slimbench.leaderboard.figures.plots import Gallery
from slimbench.leaderboard.site import names
from slimbench.leaderboard.site.board import Board, plural
from slimbench.leaderboard.site.pages import LONGEST_NAME, LONGEST_REMARK, page
from slimbench.leaderboard.tables.format import shorten

_SIZE = re.compile(rb'<svg\b[^>]*\bviewBox="0 0 ([0-9.]+) ([0-9.]+)"')
_LONGEST_TEXT = 1200


@dataclass(frozen=True)
class Figure:
    """A figure as the page shows it; `width` and `height` in points."""

    title: str
    reading: str
    alternative: str
    svg: str
    files: list[tuple[str, str]]
    width: int
    height: int


@dataclass(frozen=True)
class Section:
    """The figures of rows that may be compared, with the sets of the ranking in which these rows stand."""

    id: str
    title: str
    figures: list[Figure]
    sets: list[dict[str, str]]


def render(board: Board, beside: Mapping[str, bytes], gallery: Gallery) -> str:
    """The page.

    Args:
        beside: Content of the drawn files by path.
    """
    return page(
        "figures.html.j2",
        "figures.html",
        "Figures",
        sections=_sections(board, beside, gallery),
        summary=plural(len(gallery.plots), "figure"),
        absent=[(gone.kind, shorten(f"{gone.title}: {gone.reason}", LONGEST_REMARK)) for gone in gallery.absent],
        without=gallery.without,
        kinds=[(kind.name, f"{kind.about[0].upper()}{kind.about[1:]}.") for kind in catalogue.KINDS],
    )


def _sections(board: Board, beside: Mapping[str, bytes], gallery: Gallery) -> list[Section]:
    """The figures by what their rows have in common, most figures first; what spans all models comes last."""
    together: dict[str, list[tuple[str, Plot]]] = {}
    for path, plot in gallery.plots.items():
        together.setdefault(plot.group.title, []).append((path, plot))
    position = {id(row): number for number, row in enumerate(board.rows)}
    table_of = {id(row): number for number, table in enumerate(board.tables) for row in table.rows}
    found = []
    for title, own in together.items():
        rows = [row for _, plot in own for row in plot.group.rows]
        first = min((position[id(row)] for row in rows), default=len(position))
        whole = len({row.model for row in rows}) != 1
        there = sorted({table_of[id(row)] for row in rows})
        section = Section(
            names.slug(title),
            shorten(title, LONGEST_NAME),
            [_figure(path, plot, beside) for path, plot in own],
            [board.settings[number] for number in there],
        )
        found.append(((whole, -len(own), first, title), section))
    return [section for _, section in sorted(found, key=lambda pair: pair[0])]


def _figure(path: str, plot: Plot, beside: Mapping[str, bytes]) -> Figure:
    size = _SIZE.search(beside[f"{path}.svg"])
    assert size is not None, path
    words = f"{plot.title}, {plot.group.title} ({plot.group.setting}). {plot.reading} {plot.caption}"
    return Figure(
        plot.title,
        shorten(plot.reading, _LONGEST_TEXT),
        shorten(words, _LONGEST_TEXT),
        f"{path}.svg",
        [(kind.upper(), f"{path}.{kind}") for kind in KINDS],
        *(round(float(length)) for length in size.groups()),
    )
