"""Which plots and figures lie in the folder of a board, and under which names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from slimbench.leaderboard.figures import catalogue, pareto, scaling
from slimbench.leaderboard.figures.canvas import Plot
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.site.board import Board
from slimbench.leaderboard.tables.tables import evidence, titles

FIGURES = "figures"
STEMS = ("pareto", "pareto-*-*-*-*", "sizes")
"""What files of plots are called without an ending: the first table's, those of model, suite, speed and device, that over sizes."""
MOST_PLOTTED, MOST_LINES, MOST_POINTS = 4, 8, 10
MOST_FIGURES = 60
"""So many figures of the catalogue are drawn, and no more: each takes about half a second of one core, as long as hundreds of pages."""

_OVER_POINTS = ("speedup", "prompt-speedup")


@dataclass(frozen=True)
class Gallery:
    """The figures of a board. Nothing is drawn yet.

    Attributes:
        plots: By their path without an ending.
        absent: For each kind of which there is no figure the reason.
        without: Why figures that the records allow were not drawn; empty if all were.
    """

    plots: Mapping[str, Plot] = field(default_factory=dict)
    absent: Sequence[catalogue.Absent] = ()
    without: str = ""


def gallery(board: Board, figures: bool) -> Gallery:
    """The plots of the tables of most evidence and over model sizes, and the catalogue's figures, up to `MOST_FIGURES`.

    Args:
        figures: Whether the catalogue is wanted.
    """
    plots = {**_pareto(board), **_sizes(board.rows)}
    if not figures:
        return Gallery(plots, without="This board was built without them.")
    found = list(catalogue.figures(board.rows))
    drawn = [plot for plot in found if isinstance(plot, Plot)]
    kinds = {plot.kind for plot in drawn}
    nearest: dict[str, catalogue.Absent] = {}
    for gone in found:
        if isinstance(gone, catalogue.Absent) and gone.kind not in kinds and gone.rows >= nearest.get(gone.kind, gone).rows:
            nearest[gone.kind] = gone
    kept = _first(drawn)
    left = f"These records allow {len(drawn):,} figures; of each kind those of most evidence are drawn." if len(kept) < len(drawn) else ""
    return Gallery(plots | {f"{FIGURES}/{plot.name}": plot for plot in kept}, list(nearest.values()), left)


def _first(drawn: Sequence[Plot]) -> list[Plot]:
    """As many as are drawn, in their order: the first of every kind, then the second of every kind, and so on, by evidence."""
    place: dict[int, int] = {}
    seen: Counter[str] = Counter()
    for plot in sorted(drawn, key=_says, reverse=True):
        place[id(plot)] = seen[plot.kind]
        seen[plot.kind] += 1
    kept = {id(plot) for plot in sorted(drawn, key=lambda plot: place[id(plot)])[:MOST_FIGURES]}
    return [plot for plot in drawn if id(plot) in kept]


def _says(plot: Plot) -> tuple[int, tuple[bool, float, float, int]]:
    """By what a figure is chosen among those of its kind: over batch and context first by the points of a row, else by evidence alone."""
    points = max((len(row.speed_points) for row in plot.group.rows), default=0) if plot.kind in _OVER_POINTS else 0
    return points, evidence(plot.group.rows)


def _pareto(board: Board) -> dict[str, Plot]:
    """The plots of the tables of most evidence: the first is `pareto`, others are named by model and suite."""
    names = titles(board.tables)
    plottable = [number for number in board.sequence if pareto.plottable(board.tables[number])]
    plots: dict[str, Plot] = {}
    for number in plottable[:MOST_PLOTTED]:
        table = board.tables[number]
        row = table.rows[0]
        words = [row.model, row.suite, row.speed, row.device] if plots else []
        stem = "-".join(["pareto", *(re.sub(r"[^a-z0-9.]+", "-", word.lower()).strip("-.")[:40] for word in words)])
        while stem in plots:
            stem += "-2"
        plots[stem] = pareto.plot(table, names[number])
    return plots


def _sizes(board: Sequence[Row]) -> dict[str, Plot]:
    """The plot of decode time against bytes, where several models were measured alike: of as many lines and models as can be read."""
    drawn = [replace(line, points=_spread(line.points)) for line in scaling.series(board)[:MOST_LINES]]
    return {"sizes": scaling.plot(drawn)} if drawn else {}


def _spread(points: tuple[Any, ...]) -> tuple[Any, ...]:
    """At most `MOST_POINTS` of the points, both ends among them."""
    last, kept = len(points) - 1, min(len(points), MOST_POINTS) - 1
    return tuple(points[round(number * last / kept)] for number in range(kept + 1)) if kept else points
