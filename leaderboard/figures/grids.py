"""Methods of equal bits on common grids: what each gives, and what the grid does."""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean
from typing import TYPE_CHECKING

from slimbench.leaderboard.compare.grids import GRIDS, bits, grid_of
from slimbench.leaderboard.figures.canvas import Plot, canvas, category_axis, legend
from slimbench.leaderboard.figures.groups import Group, Unplottable, left_out
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.tables.format import decimal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LOOKS = dict(zip(GRIDS, (("#d55e00", "s"), ("#0072b2", "o"), ("#009e73", "D")), strict=True))
_APART = 0.24


def grids(group: Group) -> Plot:
    """Perplexity above dense, a line for each method and a mark for each grid, of the bits at which most methods stand on several.

    Raises:
        Unplottable: There are not two methods on two grids at equal bits.
    """
    found: dict[int, dict[str, dict[str, list[Row]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    again: dict[int, list[Row]] = defaultdict(list)
    for row in sorted(group.rows, key=lambda row: (row.seed, row.calibration_seed or 0)):
        grid = grid_of(row)
        if (
            grid
            and len(row.methods) == 1
            and None not in (row.perplexity_delta_percent, row.perplexity_ratio_low, row.perplexity_ratio_high)
        ):
            draws = found[bits(row)][row.methods[0]][grid]
            known = row.calibration_seed in {other.calibration_seed for other in draws}  # as in the table of grids
            (again[bits(row)] if known else draws).append(row)
    several = {width: {name: of for name, of in methods.items() if len(of) > 1} for width, methods in found.items()}
    width = max(several, key=lambda width: (len(several[width]), width), default=0)
    if len(several.get(width, {})) < 2:
        raise Unplottable("no two methods stand on two grids at equal bits")
    methods = found[width]
    names = sorted(methods, key=lambda name: (min(map(_mean, methods[name].values())), name))
    drawn = [row for of in methods.values() for rows in of.values() for row in rows]
    note = "Bars are 95 % intervals over windows, paired with dense; small marks are draws of the calibration text, large ones their mean. "
    note += "Searched ranges and learned ones stand together, and so do offsets of any range."
    if count := len(again[width]):
        note += f" Further rows of a draw, not shown: {count}."
    text = " ".join(filter(None, [note, left_out(group, [*drawn, *again[width]], f"a grid of {width} bits")]))
    title = f"Methods on common grids, {width} bits"

    def make() -> Figure:
        figure, (ax,) = canvas(f"{title}: {group.title}", group.setting, text, 9.4, 2 + 0.55 * len(names))
        for grid, (colour, marker) in _LOOKS.items():
            for place, name in enumerate(names):
                if rows := methods[name].get(grid):
                    height = place + _APART * (GRIDS.index(grid) - 1)
                    low, high = (
                        100 * (fmean(getattr(row, bound) for row in rows) - 1)
                        for bound in ("perplexity_ratio_low", "perplexity_ratio_high")
                    )
                    ax.plot([low, high], [height] * 2, color=colour, lw=1.4, zorder=2)
                    draws = [row.perplexity_delta_percent or 0.0 for row in rows]
                    ax.plot(draws, [height] * len(draws), ls="none", marker=marker, ms=3, color=colour, alpha=0.6, zorder=3)
                    ax.plot([fmean(draws)], [height], ls="none", marker=marker, ms=7, color=colour, mec="white", mew=0.8, zorder=4)
            ax.plot([], [], ls="none", marker=marker, ms=7, color=colour, label=grid)
        ax.axvline(0, color="#444b54", lw=1, ls=(0, (4, 2)), zorder=1, label="dense")
        category_axis(ax, names)
        ax.set_xlabel("perplexity above dense, %  (← lower is better)")
        legend(ax)
        return figure

    best = min(((_mean(rows), name, grid) for name, of in methods.items() for grid, rows in of.items()))
    reading = f"{best[1]} loses least, {decimal(1, signed=True)(best[0])} % ({best[2]})."
    return Plot("grids", group, title, reading, text, make)


def _mean(rows: list[Row]) -> float:
    return fmean(row.perplexity_delta_percent or 0.0 for row in rows)
