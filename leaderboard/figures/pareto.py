"""The plot of one table: perplexity above dense against bytes and against tokens per second, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimbench.leaderboard.figures.canvas import Plot, canvas, legend
from slimbench.leaderboard.figures.drawing import Kind, render
from slimbench.leaderboard.figures.groups import Group, left_out, listed, off_scale
from slimbench.leaderboard.figures.measures import BYTES, SPEED, Measure, Point, front, points, quality
from slimbench.leaderboard.figures.scatter import OFF_SCALE, above, below, finish, note_on, off_text, quality_axis, scatter
from slimbench.leaderboard.tables.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = (BYTES, SPEED)


def plottable(table: Table) -> bool:
    """Whether there is anything to plot: at least two rows with a quality and a size or speed."""
    return bool(_drawn(table))


def caption(table: Table) -> str:
    """What the plot shows, and which rows it does not."""
    group = _group(table)
    limit = off_scale(group, OFF_SCALE)
    hidden = left_out(group, [p.row for _, shown in _drawn(table) for p in shown] + above(group, limit), "both numbers")
    return " ".join(filter(None, [note_on(quality(table.rows), group), off_text(group, limit), hidden]))


def plot(table: Table, heading: str) -> Plot:
    """The plot of a table that is plottable, with its words.

    Args:
        heading: What the table is called among others.
    """
    group = Group(table.rows, heading, table.setting)
    fronts = [(x, listed(group.name(p.row) for p in front(shown, x, quality(table.rows)))) for x, shown in _drawn(table)]
    beaten = [f"in {quality(table.rows).missing} and {x.missing}, none beats {names}" for x, names in fronts if names]
    reading = "; ".join(beaten) or "no row ended well"
    name = quality(table.rows).missing
    title = " and ".join([f"{name[0].upper()}{name[1:]} against " + fronts[0][0].missing, *(x.missing for x, _ in fronts[1:])])
    return Plot("pareto", group, title, f"{reading[0].upper()}{reading[1:]}.", caption(table), lambda: _figure(table))


def draw(table: Table, kind: Kind) -> bytes:
    """The plot as a file: quality with its 95 % interval against bytes and against tokens per second."""
    return render(lambda: _figure(table), kind)


def _group(table: Table) -> Group:
    return Group(table.rows, table.title, table.setting)


def _drawn(table: Table) -> list[tuple[Measure, list[Point]]]:
    group, y = _group(table), quality(table.rows)
    on_scale = below(group, off_scale(group, OFF_SCALE))
    return [(x, shown) for x in _PANELS if len(shown := points(on_scale, x, y)) > 1]


def _figure(table: Table) -> Figure:
    group, drawn, y = _group(table), _drawn(table), quality(table.rows)
    figure, axes = canvas(table.title, table.setting, caption(table), 6.4 * len(drawn), 5.2, len(drawn), sharey=True)
    panels = []
    for ax, (x, shown) in zip(axes, drawn, strict=True):
        members = front(shown, x, y)
        scatter(ax, shown, members)
        ax.set_xlabel(x.label)
        panels.append((ax, shown, members))
    quality_axis(axes, [p.y for _, shown in drawn for p in shown], y, group)
    fullest = max(panels, key=lambda panel: len({p.row.family for p in panel[1]}))
    legend(axes[-1], *fullest[0].get_legend_handles_labels())
    finish(figure, panels, group)
    return figure
