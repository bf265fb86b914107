"""How far the perplexity of a pipeline depends on the seeds of its calibration text and of the cell."""

from __future__ import annotations

from collections import Counter
from statistics import fmean
from typing import TYPE_CHECKING

from slimbench.leaderboard.figures.canvas import Plot, canvas, category_axis, spread_axis
from slimbench.leaderboard.figures.drawing import INK, MUTED
from slimbench.leaderboard.figures.groups import Group, Unplottable, left_out
from slimbench.leaderboard.figures.measures import PERPLEXITY
from slimbench.leaderboard.figures.palette import look_of
from slimbench.leaderboard.figures.scatter import corpus
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.tables.format import decimal, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LINES = 40
_FORM = decimal(2)


def seeds(group: Group) -> Plot:
    """The perplexities of rows that differ in nothing but seeds, one line a pipeline.

    Raises:
        Unplottable: No pipeline was measured with two seeds.
    """
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in group.rows:
        if row.perplexity is not None and (row.replicates or 0) > 1:
            found.setdefault((row.pipeline, row.engine_label, row.calibration_text or ""), []).append(row)
    whole = sorted((rows for rows in found.values() if len(rows) > 1), key=lambda rows: (_mean(rows), rows[0].pipeline))
    if not whole:
        raise Unplottable("no pipeline was measured with more than one seed")
    lines = whole[:MOST_LINES]
    reference = group.reference
    drawn = [row for rows in whole for row in rows]
    note = "A mark for each seed, a bar at their mean; s is the standard deviation over the seeds."
    note += " The dashed line is the dense model." if reference else ""
    note += f" The {len(whole) - len(lines)} pipelines of the highest perplexity are left out." if len(whole) > len(lines) else ""
    hidden = left_out(group, [*drawn, *([reference] if reference else [])], "a second seed")
    text = " ".join(filter(None, [note, hidden]))
    title = "Spread over seeds"

    def make() -> Figure:
        figure, (ax,) = canvas(f"{title}: {group.title}", group.setting, text, 9, 2 + 0.34 * len(lines))
        names, texts = [], Counter((rows[0].pipeline, rows[0].engine_label) for rows in lines)
        for place, rows in enumerate(lines):
            values, look = [row.perplexity or 0.0 for row in rows], look_of(rows[0])
            ax.plot([min(values), max(values)], [place, place], color=look.colour, lw=1.2, alpha=0.5, zorder=2)
            ax.plot(values, [place] * len(rows), ls="none", marker=look.marker, ms=6.5, color=look.colour, mec="white", mew=0.7, zorder=3)
            ax.plot([_mean(rows)], [place], ls="none", marker="|", ms=15, mew=1.6, color=INK, zorder=4)
            deviation = rows[0].perplexity_seed_sd
            words = f"{_FORM(_mean(rows))}, s = {_FORM(deviation)}, {len(rows)} seeds" if deviation is not None else f"{len(rows)} seeds"
            ax.annotate(
                words, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=7.5, color=MUTED, annotation_clip=False
            )
            names.append(_name(rows[0], group, texts))
        if reference and reference.perplexity:
            ax.axvline(reference.perplexity, color=MUTED, lw=1, ls=(0, (4, 2)), zorder=1)
        category_axis(ax, names)
        known = [row.perplexity for rows in lines for row in rows if row.perplexity]
        spread_axis(ax, "x", [*known, *([reference.perplexity] if reference and reference.perplexity else [])])
        ax.set_xlabel(f"{corpus(group)}{PERPLEXITY.label.replace('↓', '←')}", parse_math=False)
        return figure

    spread, widest = max((rows[0].perplexity_seed_sd or 0.0, rows[0].pipeline) for rows in whole)
    return Plot("seeds", group, title, f"Seeds move {shorten(widest, 44)} most: s = {_FORM(spread)}.", text, make)


def _name(row: Row, group: Group, texts: Counter[tuple[str, str]]) -> str:
    """The pipeline with its engine and its calibration text, where those differ."""
    engine = row.engine if group.engines_differ else None
    text = row.calibration_text if texts[row.pipeline, row.engine_label] > 1 else None
    return shorten(" · ".join(filter(None, (row.pipeline, engine, text))), 44)


def _mean(rows: list[Row]) -> float:
    return fmean(row.perplexity or 0.0 for row in rows)
