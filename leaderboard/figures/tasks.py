"""A heat map of methods and tasks: how far each accuracy moved from the dense model's."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import TwoSlopeNorm

from slimbench.harness.stats.significance import LEVEL
from slimbench.leaderboard.figures.canvas import Plot, canvas
from slimbench.leaderboard.figures.drawing import INK
from slimbench.leaderboard.figures.groups import Group, Unplottable, left_out
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.tables.format import decimal, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_ROWS = 45
_POINTS = decimal(1, signed=True)
_DARK = 0.62


def tasks(group: Group) -> Plot:
    """Accuracy differences by row and task, in points of per cent, significant ones marked; the least loss first.

    Raises:
        Unplottable: No row answers the items of its reference.
    """
    whole = [row for row in group.rows if any(value is not None for value in row.task_delta.values())]
    if not whole:
        raise Unplottable("no row has the zero-shot tasks of its reference")
    ordered = sorted(whole, key=lambda row: (-_mean(row), group.name(row)))
    rows = ordered[:MOST_ROWS]
    names = sorted({task for row in rows for task in row.task_delta})
    base = [row for row in group.rows if row.is_reference and row.accuracy is not None]
    note = (
        "Accuracy above that of the dense model on the same items, in points; mean: of the tasks. * Significant at "
        f"{100 * LEVEL:.0f} % (McNemar's exact test, Holm's correction over the row's tasks)."
    )
    note += f" The {len(whole) - len(rows)} rows that lose most are left out." if len(whole) > len(rows) else ""
    text = " ".join(filter(None, [note, left_out(group, [*whole, *base], "tasks of the reference")]))
    title = "Accuracy by task"

    def make() -> Figure:
        width = 4.2 + 0.95 * (len(names) + 1)
        figure, (ax,) = canvas(f"{title}: {group.title}", group.setting, text, max(width, 7.5), 2.6 + 0.27 * len(rows))
        values = np.array([[_points(row, name) for name in names] + [100 * _mean(row)] for row in rows], dtype=float)
        reach = max(float(np.nanmax(np.abs(values))), 1.0)
        colours = colormaps["PuOr"].with_extremes(bad="#eeeeee")
        norm = TwoSlopeNorm(0, -reach, reach)
        image = ax.imshow(np.ma.masked_invalid(values), cmap=colours, norm=norm, aspect="auto")
        for y, row in enumerate(rows):
            for x, value in enumerate(values[y]):
                p = row.task_p.get(names[x]) if x < len(names) else None
                known = np.isfinite(value)
                mark = " *" if p is not None and p < LEVEL else ""
                ink = "white" if known and abs(value) > _DARK * reach else INK
                weight = "bold" if mark or x == len(names) else "normal"
                words = f"{_POINTS(value) if value else 0}{mark}" if known else "–"
                ax.text(x, y, words, ha="center", va="center", fontsize=7.5, color=ink, fontweight=weight)
        ax.set_xticks(
            range(len(names) + 1),
            [*(shorten(name, 30) for name in names), "mean"],
            rotation=30,
            ha="left",
            rotation_mode="anchor",
            parse_math=False,
            fontsize=8.5,
            color=INK,
        )
        ax.xaxis.tick_top()
        ax.set_yticks(range(len(rows)), [group.name(row, 40) for row in rows], fontsize=8.5, color=INK, parse_math=False)
        ax.tick_params(length=0)
        ax.grid(visible=False)
        ax.axvline(len(names) - 0.5, color="white", lw=3)
        ax.spines[:].set_visible(False)
        figure.colorbar(image, ax=ax, label="points", fraction=0.03, pad=0.02)
        return figure

    ends = [f"{group.name(row)} ({_POINTS(100 * _mean(row))} points)" for row in (ordered[0], ordered[-1])]
    reading = f"On average, {ends[0]} loses least and {ends[1]} most." if len(whole) > 1 else f"On average: {ends[0]}."
    return Plot("tasks", group, title, reading, text, make)


def _points(row: Row, task: str) -> float:
    value = row.task_delta.get(task)
    return float("nan") if value is None else 100 * value


def _mean(row: Row) -> float:
    return fmean(value for value in row.task_delta.values() if value is not None)
