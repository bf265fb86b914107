"""Speed-up over batch and over context, with what the roofline would allow, and where a method stops being faster than dense."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from slimbench.harness.schema.ledger import Phase
from slimbench.leaderboard.compare.crossover import SPEEDUP, Gain, Place, counts, places
from slimbench.leaderboard.figures.canvas import Plot, canvas, side_legend, spread_axis
from slimbench.leaderboard.figures.drawing import MUTED
from slimbench.leaderboard.figures.groups import Group, Unplottable, left_out
from slimbench.leaderboard.figures.palette import Look, method_of
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.tables.format import decimal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = 16
_LANE = 8.0
"""Points between the crossings of two rows."""
_KINDS: dict[Phase, str] = {"decode": "speedup", "prefill": "prompt-speedup"}
_TITLES: dict[Phase, str] = {"decode": "Speed-up over batch and context", "prefill": "Speed-up of the prompt over batch and context"}
_CROSSES = (
    "Bars along and under the line of 1, with the hollow mark of the row: where it stops, or begins, to be faster than dense, with the "
    "95 % interval, which is open where it ends at the first or the last point; of rows without an invalidating flag."
)
_NOTES: dict[Phase, str] = {
    "decode": "Decode time of the dense model on the same engine over that of the row, bars are 95 % intervals.",
    "prefill": "Time of the prompt in the dense model on the same engine over that of the row, bars are 95 % intervals.",
}
_BOUNDS = (
    "Thin dotted lines with hollow marks: the speed-up if the row read its weights and KV cache at the measured bandwidth (roofline: of "
    "reads, in older rows of copies)."
)
_AXES = (("batch", "prompt", "sequences in the batch"), ("prompt", "batch", "tokens of context"))


@dataclass(frozen=True)
class Reading:
    """A speed-up at one point of the grid.

    Attributes:
        low: Lower bound of its interval; the value itself where it has none.
        high: Upper bound.
        bound: Speed-up that the row would have at its roofline; None where that is unknown.
        known: It has an interval.
    """

    at: int
    value: float
    low: float
    high: float
    bound: float | None
    known: bool


@dataclass(frozen=True)
class Panel:
    """What one pair of axes shows: speed-ups over one side of the grid, the other one fixed."""

    over: str
    fixed: str
    fixed_at: int
    label: str
    series: dict[int, list[Reading]]


def speedups(group: Group, phase: Phase) -> Plot:
    """Speed-up of decoding, or of the prompt, over the reference on the same engine over batch and context.

    Raises:
        Unplottable: Speed was measured at one batch and one context only.
    """
    rows = [row for row in group.rows if row.speed_points and not row.is_reference]
    panels = [panel for over, fixed, label in _AXES if (panel := _panel(rows, phase, over, fixed, label))]
    if not panels:
        grid = {(p.get("batch"), p.get("prompt")) for row in rows for p in row.speed_points}
        raise Unplottable(f"no row has speed-ups at several batches or contexts ({len(grid)} point{'s' * (len(grid) != 1)} in all)")
    drawn = sorted({index for panel in panels for index in panel.series})
    looks = dict(zip(drawn, group.palette.apart(method_of(rows[index]) for index in drawn), strict=True))
    shown = [rows[index] for index in drawn]
    bases = [row for row in group.rows if row.is_reference]
    lines = [own for panel in panels for own in panel.series.values()]
    bounds = _BOUNDS if any(len(_bounds(own)) > 1 for own in lines) else ""
    crosses = _CROSSES if any(_crossings(rows[at], own, phase) for panel in panels for at, own in panel.series.items()) else ""
    text = " ".join(filter(None, [_NOTES[phase], bounds, crosses, left_out(group, [*shown, *bases], "several speed points")]))
    title = _TITLES[phase]

    def make() -> Figure:
        figure, axes = canvas(f"{title}: {group.title}", group.setting, text, 3.2 + 4.6 * len(panels), 5.2, len(panels), sharey=True)
        for ax, panel in zip(axes, panels, strict=True):
            _draw(ax, panel, rows, looks, group, phase)
        axes[0].set_ylim(bottom=0)
        spread_axis(axes[0], "y", [value for own in lines for r in own for value in (r.low, r.bound or r.value)])
        axes[0].set_ylabel("times as fast as dense  (↑ higher is better)")
        fullest = max(range(len(panels)), key=lambda i: len(panels[i].series))
        side_legend(axes[-1], *axes[fullest].get_legend_handles_labels())
        return figure

    fastest, panel, index = max(
        ((max(own, key=lambda r: r.value), panel, index) for panel in panels for index, own in panel.series.items()),
        key=lambda found: found[0].value,
    )
    where = f"at {panel.over} {fastest.at}, {panel.fixed} {panel.fixed_at}"
    reading = f"Fastest is {group.name(rows[index])}: {decimal(2)(fastest.value)} times as fast as dense {where}."
    return Plot(_KINDS[phase], group, title, reading, text, make)


def _panel(rows: Sequence[Row], phase: Phase, over: str, fixed: str, label: str) -> Panel | None:
    """The panel at the fixed value that shows most; None where no row was measured at two points."""
    found: dict[int, dict[int, list[Reading]]] = {}
    for index, row in enumerate(rows):
        for point in row.speed_points:
            at, kept, value = point.get(over), point.get(fixed), point.get(SPEEDUP[phase])
            if isinstance(at, int) and isinstance(kept, int) and isinstance(value, float) and min(at, kept, value) > 0:
                found.setdefault(kept, {}).setdefault(index, []).append(_reading(at, value, point, phase))
    best: Panel | None = None
    for kept, series in sorted(found.items()):
        lines = {i: sorted(own, key=lambda r: r.at) for i, own in series.items() if len({r.at for r in own}) > 1}
        lines = dict(sorted(lines.items(), key=lambda item: -max(r.value for r in item[1]))[:MOST_LINES])
        if lines and (best is None or sum(map(len, lines.values())) > sum(map(len, best.series.values()))):
            best = Panel(over, fixed, kept, label, lines)
    return best


def _reading(at: int, value: float, point: dict[str, float | int | str | None], phase: Phase) -> Reading:
    low, high = (point.get(f"{SPEEDUP[phase]}_{bound}") for bound in ("low", "high"))
    fraction = point.get("roofline_fraction") if phase == "decode" else None
    bound = value / fraction if isinstance(fraction, float) and fraction > 0 else None
    if isinstance(low, float) and isinstance(high, float) and 0 < low <= value <= high < math.inf:
        return Reading(at, value, low, high, bound, known=True)
    return Reading(at, value, value, value, bound, known=False)


def _bounds(own: Sequence[Reading]) -> list[tuple[int, float]]:
    return [(reading.at, reading.bound) for reading in own if reading.bound is not None]


def _crossings(row: Row, own: Sequence[Reading], phase: Phase) -> list[Place]:
    """Those that the table of crossovers has, too."""
    if not counts(row, phase) or not all(reading.known for reading in own):
        return []
    return [place for place in places([(r.at, Gain(r.value, r.low, r.high)) for r in own]) if place.is_shown]


def _draw(ax: Axes, panel: Panel, rows: Sequence[Row], looks: Mapping[int, Look], group: Group, phase: Phase) -> None:
    from matplotlib.transforms import offset_copy

    lanes = (offset_copy(ax.transData, ax.get_figure(root=True), y=-_LANE * lane, units="points") for lane in count())
    for index, own in sorted(panel.series.items()):
        look = looks[index]
        style: dict[str, Any] = {"color": look.colour, "marker": look.marker}
        at = [r.at for r in own]
        spread = [[max(0.0, r.value - r.low) for r in own], [max(0.0, r.high - r.value) for r in own]]
        name = group.name(rows[index], 32).lstrip("_")
        ax.errorbar(at, [r.value for r in own], yerr=spread, ls=look.dashes, lw=1.5, elinewidth=1, ms=6, mec="white", label=name, **style)
        if len(bounds := _bounds(own)) > 1:
            ax.plot(*zip(*bounds, strict=True), ls=":", lw=1, ms=4, mfc="white", alpha=0.8, **style)
        for place in _crossings(rows[index], own, phase):
            reach = [[place.at - (place.low or at[0])], [(place.high or at[-1]) - place.at]]
            ax.errorbar([place.at], [1], xerr=reach, ms=6, mfc="white", lw=2.5, ls="", zorder=4, transform=next(lanes), **style)
    ax.axhline(1, color=MUTED, lw=0.9)
    ticks = sorted({r.at for own in panel.series.values() for r in own})
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    ax.margins(x=0.1)
    ax.set_xlabel(panel.label)
    ax.set_title(f"{panel.fixed} {panel.fixed_at}", fontsize=9, color=MUTED)
