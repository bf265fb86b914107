"""Quality against cost, and two kinds of quality against each other: each row a point with its intervals."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from slimbench.leaderboard.figures.canvas import CAPTION, Plot, bit_axis, canvas, legend, line_length, log_axis, spread_axis
from slimbench.leaderboard.figures.drawing import MUTED
from slimbench.leaderboard.figures.groups import Group, Unplottable, left_out, listed, off_scale, unbeaten
from slimbench.leaderboard.figures.labels import Named, place
from slimbench.leaderboard.figures.measures import BITS, KL, PERPLEXITY, Measure, Point, front, points
from slimbench.leaderboard.figures.palette import FAMILIES, ORDER, family_of, look_of
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.tables.format import decimal, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OFF_SCALE = 20.0
CROWD = 40
_STAR, _DOT = 7.0, 3.8
UNNAMED = "Points without a name found no room for it."
_CROWDED = "Of so many, only the reference and the front are named."


def against(group: Group, y: Measure, x: Measure) -> Plot:
    """Quality over cost with its Pareto front.

    Raises:
        Unplottable: Fewer than two rows have both numbers.
    """
    limit = off_scale(group, OFF_SCALE) if y is PERPLEXITY else float("inf")
    shown = points(group.rows, x, y, limit)
    if len(shown) < 2:
        raise Unplottable(f"{_rows(len(shown))} with both {y.missing} and {x.missing}")
    note = "Bars are 95 % intervals; the line joins the rows that none beats in both, those with an invalidating flag apart."
    hidden = left_out(group, [p.row for p in shown] + above(group, limit), f"{y.missing} or {x.missing}")
    text = " ".join(filter(None, [note, off_text(group, limit), hidden]))
    title = f"{y.name.capitalize()} against {x.missing}"

    members = front(shown, x, y)

    def make() -> Figure:
        figure, (ax,) = canvas(f"{title}: {group.title}", group.setting, text, 8.6, 6)
        scatter(ax, shown, members)
        ax.set_xlabel(x.label)
        ax.set_ylabel(f"{corpus(group)}{y.label}" if y is PERPLEXITY else y.label, parse_math=False)
        spread_axis(ax, "y", [p.y for p in shown])
        bit_axis(ax, [p.x for p in shown]) if x is BITS else spread_axis(ax, "x", [p.x for p in shown])
        legend(ax)
        finish(figure, [(ax, shown, members)], group)
        return figure

    return Plot(f"{y.name}-{x.name}", group, title, unbeaten(group, len(shown), [p.row for p in members]), text, make)


def divergence(group: Group) -> Plot:
    """KL to the dense model over perplexity: how far the text's likelihood and the whole distribution tell the same."""
    limit = off_scale(group, OFF_SCALE)
    shown = [p for p in points(group.rows, PERPLEXITY, KL) if p.x <= limit and p.y > 0]
    base = group.reference
    if len(shown) < 2:
        raise Unplottable(f"{_rows(len(shown))} with both a perplexity and a KL to the dense model")
    note = "Bars are 95 % intervals."
    if base:
        note += " The dashed line is a loss in log-likelihood equal to the KL; rows above it moved more than the text shows."
    hidden = left_out(group, [p.row for p in shown] + above(group, limit) + [row for row in group.rows if row.is_reference], "KL")
    text = " ".join(filter(None, [note, off_text(group, limit), hidden]))
    title = "Divergence against perplexity"

    def make() -> Figure:
        figure, (ax,) = canvas(f"{title}: {group.title}", group.setting, text, 8.6, 6)
        scatter(ax, shown, [])
        log_axis(ax, "y")
        spread_axis(ax, "x", [p.x for p in shown])
        ax.set_xlabel(f"{corpus(group)}{PERPLEXITY.label.replace('↓', '←')}", parse_math=False)
        ax.set_ylabel(KL.label.replace("←", "↓"))
        path: list[tuple[float, float]] = []
        if base and base.perplexity:
            ax.autoscale(False)
            bottom, top = ax.get_ylim()
            highest = min(top, float(np.log(ax.get_xlim()[1] / base.perplexity)))
            path = [(base.perplexity * float(np.exp(kl)), float(kl)) for kl in np.geomspace(bottom, max(bottom, highest), 60)]
            ax.plot(*zip(*path, strict=True), color=MUTED, lw=1.1, ls=(0, (4, 2)), zorder=1, label="KL = loss of log-likelihood")
        legend(ax)
        finish(figure, [(ax, shown, [])], group, [path])
        return figure

    nearest, farthest = min(shown, key=lambda p: p.y), max(shown, key=lambda p: p.y)
    ends = [f"{p.y:.2g} nats ({group.name(p.row)})" for p in (nearest, farthest)]
    return Plot("divergence", group, title, f"The KL of {len(shown)} rows runs from {ends[0]} to {ends[1]}.", text, make)


def corpus(group: Group) -> str:
    """The corpus, before the word `perplexity`."""
    name = next((row.corpus for row in group.rows if row.corpus), None) or group.rows[0].suite
    return f"{shorten(name, 40)} "


def above(group: Group, limit: float) -> list[Row]:
    """The rows off the scale."""
    return [row for row in group.rows if row.perplexity is not None and row.perplexity > limit]


def off_text(group: Group, limit: float) -> str:
    """Which rows lie above the scale, with their perplexity; empty where none does."""
    off = above(group, limit)
    names = listed(f"{group.name(row, 40)} ({decimal(0)(row.perplexity or 0)})" for row in off)
    return f"Off the scale, above {OFF_SCALE:.0f} × the reference: {names}." if off else ""


def scatter(ax: Axes, shown: Sequence[Point], members: Sequence[Point]) -> None:
    """The points by family, and the front as a dashed line."""
    for family in sorted({family_of(p.row) for p in shown}, key=lambda f: (ORDER.get(f, len(FAMILIES)), f)):
        own = [p for p in shown if family_of(p.row) == family]
        look = look_of(own[0].row)
        x, y = [p.x for p in own], [p.y for p in own]
        up_down = [[p.y - p.low for p in own], [p.high - p.y for p in own]]
        sideways = [[p.x - p.left for p in own], [p.right - p.x for p in own]]
        ax.errorbar(x, y, yerr=up_down, xerr=sideways, fmt="none", ecolor=look.colour, elinewidth=1, alpha=0.45, zorder=2)
        size, level = (150, 5) if family == "reference" else (42, 4)
        ax.scatter(
            x,
            y,
            s=size,
            c=look.colour,
            marker=look.marker,
            edgecolors="white",
            linewidths=0.8,
            zorder=level,
            label=shorten(family, 30).lstrip("_") or "other",
        )
    if members:
        ax.plot([p.x for p in members], [p.y for p in members], color=MUTED, lw=1.2, ls=(0, (4, 2)), zorder=1, label="Pareto front")
    ax.margins(x=0.1, y=0.08)


def finish(
    figure: Figure,
    panels: Sequence[tuple[Axes, Sequence[Point], Sequence[Point]]],
    group: Group,
    paths: Sequence[Sequence[tuple[float, float]]] = (),
) -> None:
    """Fix the layout and name the points: the reference and the front first, and in a crowd them alone, if there are any."""
    chosen = {id(p) for _, shown, members in panels for p in (*members, *(p for p in shown if p.row.is_reference))}
    crowd = bool(chosen) and any(len(shown) > CROWD for _, shown, _ in panels)
    unsay = settle(figure, _CROWDED if crowd else UNNAMED)
    homeless = 0
    for ax, shown, members in panels:
        named = {
            id(p): Named(
                group.name(p.row),
                p.x,
                p.y,
                (p.low, p.high, p.left, p.right),
                first=id(p) in chosen,
                size=_STAR if p.row.is_reference else _DOT,
            )
            for p in shown
        }
        wanted = [named[id(p)] for p in shown if not crowd or id(p) in chosen]
        homeless += place(ax, list(named.values()), [[(p.x, p.y) for p in members], *paths], wanted)
    if not crowd and not homeless:
        unsay()


def settle(figure: Figure, text: str) -> Callable[[], None]:
    """Fix the layout, with a sentence more in the caption.

    Returns:
        What takes the sentence away again, should it turn out not to be needed.
    """
    (note,) = [note for note in figure.texts if note.get_gid() == CAPTION]
    before = note.get_text()
    note.set_text("\n".join(line for part in f"{before} {text}".split("\n") for line in textwrap.wrap(part, line_length(figure))))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return lambda: note.set_text(before)


def _rows(count: int) -> str:
    return {0: "no row", 1: "only one row"}.get(count, f"{count} rows")
