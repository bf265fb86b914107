"""Pipelines of several steps: the loss that the steps would have apart, and the one that they have together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimbench.leaderboard.figures.canvas import Plot, canvas, category_axis, legend
from slimbench.leaderboard.figures.groups import Group, Unplottable, left_out
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.tables.format import decimal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EXPECTED, _MEASURED = "#8c6d31", "#0072b2"


def joint(group: Group) -> Plot:
    """Perplexity above dense of each pipeline beside the product of the losses of its steps alone.

    Raises:
        Unplottable: No pipeline was measured beside each of its steps.
    """
    judged = [row for row in group.rows if row.perplexity_delta_percent is not None]
    alone = {(row.pipeline, row.calibration): row for row in judged if "+" not in row.pipeline}
    found: list[tuple[Row, float]] = []
    for row in group.rows:
        parts = [alone.get((name, row.calibration)) or alone.get((name, None)) for name in row.pipeline.split("+")]
        if len(parts) > 1 and row.perplexity_delta_percent is not None and all(parts):
            expected = 1.0
            for part in parts:
                expected *= 1 + (part.perplexity_delta_percent or 0.0) / 100 if part else 1.0
            found.append((row, expected))
    if not found:
        raise Unplottable("no pipeline was measured beside each of its steps alone")
    found.sort(key=lambda pair: (_above(pair[0]), pair[0].label))
    note = "A pipeline whose point lies right of its mark loses more than its steps alone say. Bars are paired 95 % intervals."
    text = " ".join(filter(None, [note, left_out(group, [row for row, _ in found], "steps")]))
    title = "What steps lose together and apart"

    def make() -> Figure:
        figure, (ax,) = canvas(f"{title}: {group.title}", group.setting, text, 9.4, 2 + 0.42 * len(found))
        for place, (row, expected) in enumerate(found):
            low, high = (100 * ((bound or 1.0) - 1) for bound in (row.perplexity_ratio_low, row.perplexity_ratio_high))
            ax.plot([low, high], [place] * 2, color=_MEASURED, lw=1.4, zorder=2)
            ax.plot([_above(row), 100 * (expected - 1)], [place] * 2, color=_EXPECTED, lw=1, ls=":", zorder=1)
            ax.plot([100 * (expected - 1)], [place], ls="none", marker="|", ms=13, mew=2, color=_EXPECTED, zorder=3)
            ax.plot([_above(row)], [place], ls="none", marker="o", ms=7, color=_MEASURED, mec="white", mew=0.8, zorder=4)
        ax.plot([], [], ls="none", marker="|", ms=11, mew=2, color=_EXPECTED, label="product of the steps alone")
        ax.plot([], [], ls="none", marker="o", ms=7, color=_MEASURED, label="measured together")
        category_axis(ax, [group.name(row) for row, _ in found])
        ax.set_xlabel("perplexity above dense, %  (← lower is better)")
        legend(ax)
        return figure

    shares = [((1 + _above(row) / 100) / expected, row) for row, expected in found]
    share, worst = max(shares, key=lambda pair: pair[0])
    reading = f"{worst.label} loses most beyond its steps: {decimal(1, 100, signed=True)(share - 1)} % of their product."
    return Plot("joint", group, title, reading, text, make)


def _above(row: Row) -> float:
    return row.perplexity_delta_percent or 0.0
