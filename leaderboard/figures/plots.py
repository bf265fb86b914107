"""Which plots and figures lie in the folder of a board, and under which names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from slimbench.leaderboard.figures import catalogue, pareto, scaling
from slimbench.leaderboard.figures.canvas import Plot
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.site.board import Board
from slimbench.leaderboard.tables.tables import Table, titles

FIGURES = "figures"
STEMS = ("pareto", "pareto-*-*-*-*", "sizes")
"""What files of plots are called without an ending: the fullest table's, those of model, suite, speed and device, that over sizes."""
MOST_PLOTTED, MOST_LINES, MOST_POINTS = 4, 8, 10
MANY = 16
"""Above so many tables only the fullest is plotted for print: a plot takes as long as hundreds of pages."""
MOST_FIGURES = 60
"""Above so many figures none of the catalogue is drawn: each takes about a second of one core."""


@dataclass(frozen=True)
class Gallery:
    """The figures of a board. Nothing is drawn yet.

    Attributes:
        plots: By their path without an ending.
        absent: For each kind of which there is no figure the reason.
        without: Why the catalogue was not drawn; empty if it was.
    """

    plots: Mapping[str, Plot] = field(default_factory=dict)
    absent: Sequence[catalogue.Absent] = ()
    without: str = ""


def gallery(board: Board, figures: bool) -> Gallery:
    """The plots of the fullest tables and over model sizes, and the catalogue's figures unless there are too many tables.

    Args:
        figures: Whether the catalogue is wanted.
    """
    plots = {**_pareto(board.tables), **_sizes(board.rows)}
    if not figures:
        return Gallery(plots, without="This board was built without them.")
    if len(board.tables) > MANY:
        sets = len(board.tables)
        return Gallery(plots, without=f"With more than {MANY} sets of cells that were measured alike, here {sets}, they are not drawn.")
    found = list(catalogue.figures(board.rows))
    drawn = [plot for plot in found if isinstance(plot, Plot)]
    if len(drawn) > MOST_FIGURES:
        return Gallery(plots, without=f"These records allow {len(drawn)} figures; above {MOST_FIGURES} they are not drawn.")
    kinds = {plot.kind for plot in drawn}
    nearest: dict[str, catalogue.Absent] = {}
    for gone in found:
        if isinstance(gone, catalogue.Absent) and gone.kind not in kinds and gone.rows >= nearest.get(gone.kind, gone).rows:
            nearest[gone.kind] = gone
    return Gallery(plots | {f"{FIGURES}/{plot.name}": plot for plot in drawn}, list(nearest.values()))


def _pareto(tables: Sequence[Table]) -> dict[str, Plot]:
    """The plots of the fullest tables: the first is `pareto`, others are named by model and suite."""
    plotted = [(table, title) for table, title in zip(tables, titles(tables), strict=True) if pareto.plottable(table)]
    measured = [sum(row.perplexity is not None for row in table.rows) for table, _ in plotted]
    fullest = sorted(range(len(plotted)), key=lambda number: (-measured[number], number))
    fullest = fullest[: MOST_PLOTTED if len(plotted) <= MANY else 1]
    plots: dict[str, Plot] = {}
    for table, title in (plotted[number] for number in sorted(fullest)):
        row = table.rows[0]
        words = [row.model, row.suite, row.speed, row.device] if plots else []
        stem = "-".join(["pareto", *(re.sub(r"[^a-z0-9.]+", "-", word.lower()).strip("-.")[:40] for word in words)])
        while stem in plots:
            stem += "-2"
        plots[stem] = pareto.plot(table, title)
    return plots


def _sizes(board: Sequence[Row]) -> dict[str, Plot]:
    """The plot of decode time against bytes, where several models were measured alike: of as many lines and models as can be read."""
    drawn = [replace(line, points=_spread(line.points)) for line in scaling.series(board)[:MOST_LINES]]
    return {"sizes": scaling.plot(drawn)} if drawn else {}


def _spread(points: tuple[Any, ...]) -> tuple[Any, ...]:
    """At most `MOST_POINTS` of the points, both ends among them."""
    last, kept = len(points) - 1, min(len(points), MOST_POINTS) - 1
    return tuple(points[round(number * last / kept)] for number in range(kept + 1)) if kept else points
