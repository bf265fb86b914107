"""The plot of one table: perplexity against bytes and against tokens per second, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimbench.leaderboard.figures.canvas import Plot, canvas, legend, spread_axis
from slimbench.leaderboard.figures.drawing import Kind, render
from slimbench.leaderboard.figures.groups import Group, left_out, listed, off_scale
from slimbench.leaderboard.figures.measures import BYTES, PERPLEXITY, SPEED, Measure, Point, front, points
from slimbench.leaderboard.figures.scatter import OFF_SCALE, above, corpus, finish, off_text, scatter
from slimbench.leaderboard.tables.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = (BYTES, SPEED)


def plottable(table: Table) -> bool:
    """Whether there is anything to plot: at least two rows with a perplexity and a size or speed."""
    return bool(_drawn(table))


def caption(table: Table) -> str:
    """What the plot shows, and which rows it does not."""
    group = _group(table)
    limit = off_scale(group, OFF_SCALE)
    hidden = left_out(group, [p.row for _, shown in _drawn(table) for p in shown] + above(group, limit), "both numbers")
    note = "Bars are 95 % intervals; the line joins the rows that none beats in both, those with an invalidating flag apart."
    return " ".join(filter(None, [note, off_text(group, limit), hidden]))


def plot(table: Table, heading: str) -> Plot:
    """The plot of a table that is plottable, with its words.

    Args:
        heading: What the table is called among others.
    """
    group = Group(table.rows, heading, table.setting)
    fronts = [(x, listed(group.name(p.row) for p in front(shown, x, PERPLEXITY))) for x, shown in _drawn(table)]
    beaten = [f"in perplexity and {x.missing}, none beats {names}" for x, names in fronts if names]
    reading = "; ".join(beaten) or "no row ended well"
    title = " and ".join(["Perplexity against " + fronts[0][0].missing, *(x.missing for x, _ in fronts[1:])])
    return Plot("pareto", group, title, f"{reading[0].upper()}{reading[1:]}.", caption(table), lambda: _figure(table))


def draw(table: Table, kind: Kind) -> bytes:
    """The plot as a file: perplexity with its 95 % interval against bytes and against tokens per second."""
    return render(lambda: _figure(table), kind)


def _group(table: Table) -> Group:
    return Group(table.rows, table.title, table.setting)


def _drawn(table: Table) -> list[tuple[Measure, list[Point]]]:
    limit = off_scale(_group(table), OFF_SCALE)
    return [(x, shown) for x in _PANELS if len(shown := points(table.rows, x, PERPLEXITY, limit)) > 1]


def _figure(table: Table) -> Figure:
    group, drawn = _group(table), _drawn(table)
    figure, axes = canvas(table.title, table.setting, caption(table), 6.4 * len(drawn), 5.2, len(drawn), sharey=True)
    panels = []
    for ax, (x, shown) in zip(axes, drawn, strict=True):
        members = front(shown, x, PERPLEXITY)
        scatter(ax, shown, members)
        ax.set_xlabel(x.label)
        panels.append((ax, shown, members))
    axes[0].set_ylabel(f"{corpus(group)}{PERPLEXITY.label}", parse_math=False)
    spread_axis(axes[0], "y", [p.y for _, shown in drawn for p in shown])
    fullest = max(panels, key=lambda panel: len({p.row.family for p in panel[1]}))
    legend(axes[-1], *fullest[0].get_legend_handles_labels())
    finish(figure, panels, group)
    return figure
