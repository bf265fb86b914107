"""Quality against size and speed: the Pareto plot of one table. The same rows give the same bytes."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from leaderboard.drawing import DPI, GRID, INK, MUTED, render
from leaderboard.row import Row
from leaderboard.tables import Axis, Table, decimal, pareto, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OFF_SCALE = 20.0
_CROWD = 24
_DIRECTIONS = ((1, 0), (0.7, 0.7), (0.7, -0.7), (-1, 0), (0, 1), (0, -1), (-0.7, 0.7), (-0.7, -0.7))
# Okabe and Ito, Color Universal Design, 2008; each family also has its own marker.
FAMILIES = {
    "reference": ("#444b54", "*"),
    "quantization": ("#0072b2", "o"),
    "pruning": ("#d55e00", "s"),
    "distillation": ("#009e73", "^"),
    "compact": ("#e69f00", "v"),
    "dynamic": ("#56b4e9", "P"),
    "combined": ("#cc79a7", "D"),
}
OTHER = ("#8c6d31", "X")
_PAGE_COLOURS = {
    INK: "ink",
    MUTED: "muted",
    GRID: "line",
    "#ffffff": "paper",
    OTHER[0]: "other",
    **{c: name for name, (c, _) in FAMILIES.items()},
}
_FAMILY_ORDER = {family: number for number, family in enumerate(FAMILIES)}


@dataclass(frozen=True)
class Point:
    """A row on a plot, with its intervals; a side without an interval is the value itself."""

    row: Row
    x: float
    y: float
    low: float
    high: float
    left: float
    right: float


@dataclass(frozen=True)
class Panel:
    """What one plot shows on its horizontal axis."""

    axis: Axis
    label: str
    scale: float
    bounds: tuple[str, str] | None = None


PANELS = (
    Panel("weight_bytes", "weights in memory, MB  (← smaller is better)", 1e-6),
    Panel("decode_tokens_per_s", "decode, tokens / s  (faster is better →)", 1.0, ("decode_low", "decode_high")),
)


def plottable(table: Table) -> bool:
    """Whether there is anything to plot: at least two rows with a perplexity and a size or speed."""
    return any(len(_points(table, panel)) > 1 for panel in PANELS)


def caption(table: Table) -> str:
    """What the plot shows, and which rows lie outside its scale."""
    limit = _limit(table)
    off = [(row.label, row.perplexity) for row in table.rows if row.perplexity is not None and row.perplexity > limit]
    listed = ", ".join(f"{shorten(name, 40)} ({decimal(0)(value)})" for name, value in off[:8])
    listed += f" and {len(off) - 8} more" if len(off) > 8 else ""
    text = "Bars are 95 % intervals; the line joins the rows that none beats in both."
    return f"{text} Off the scale, above {OFF_SCALE:.0f} × the reference: {listed}." if off else text


def draw(table: Table, kind: Literal["svg", "png"]) -> bytes:
    """The plot as a file: perplexity with its 95 % interval against bytes and against tokens per second."""
    return render(lambda: _figure(table), kind)


def inline_svg(table: Table, name: str) -> str:
    """The plot as an SVG element for a page: no prolog, no outside names, and colours that follow those of the page.

    Args:
        table: The rows.
        name: Prefix that keeps the ids of several plots on one page apart; letters, digits and hyphens.
    """
    text = draw(table, "svg").decode()
    text = text[text.index("<svg") :]
    for needless in (r"<metadata>.*?</metadata>", r"<defs>\s*<style.*?</style>\s*</defs>", r'<g id="patch_1">.*?</g>'):
        text = re.sub(needless, "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text, count=1)
    text = re.sub(r'( id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    for colour, variable in _PAGE_COLOURS.items():
        text = re.sub(rf"((?:fill|stroke): ){colour}\b", rf"\g<1>var(--{variable})", text)
    return text


def _figure(table: Table) -> Figure:
    drawn = [(panel, points) for panel in PANELS if len(points := _points(table, panel)) > 1]
    figure = Figure(figsize=(5.6 * len(drawn), 4.6), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
    fronts = [_front(table, panel, points) for panel, points in drawn]
    for ax, (panel, points), front in zip(axes, drawn, fronts, strict=True):
        _panel(ax, panel, points, front)
    axes[0].set_ylabel(f"perplexity, {shorten(table.rows[0].corpus or table.rows[0].suite, 40)}  (↓ lower is better)", parse_math=False)
    _scale(axes[0], [point.y for _, points in drawn for point in points])
    figure.suptitle(shorten(table.title, 60), x=0.01, ha="left", fontsize=11, fontweight="bold", parse_math=False)
    lines = textwrap.wrap(caption(table), 90 * len(drawn))
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=7.5, color=MUTED, parse_math=False)
    handles, labels = axes[0].get_legend_handles_labels()
    legend = figure.legend(
        handles, labels, loc="outside upper right", ncols=len(labels), frameon=False, fontsize=8, handletextpad=0.3, columnspacing=1.2
    )
    for entry in legend.get_texts():
        entry.set_parse_math(False)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for ax, (_, points), front in zip(axes, drawn, fronts, strict=True):
        _label(ax, points, front, table.engines_differ)
    return figure


def _panel(ax: Axes, panel: Panel, points: Sequence[Point], front: Sequence[Point]) -> None:
    families = sorted({family_of(point.row) for point in points}, key=lambda f: (_FAMILY_ORDER.get(f, len(FAMILIES)), f))
    for family in families:
        colour, marker = FAMILIES.get(family, OTHER)
        members = [point for point in points if family_of(point.row) == family]
        x, y = [p.x for p in members], [p.y for p in members]
        up_down = [[p.y - p.low for p in members], [p.high - p.y for p in members]]
        sideways = [[p.x - p.left for p in members], [p.right - p.x for p in members]]
        size, level = (150, 5) if family == "reference" else (42, 4)
        ax.errorbar(x, y, yerr=up_down, xerr=sideways, fmt="none", ecolor=colour, elinewidth=1, alpha=0.45, zorder=2)
        ax.scatter(
            x, y, s=size, c=colour, marker=marker, edgecolors="white", linewidths=0.8, zorder=level, label=shorten(family, 30).lstrip("_")
        )
    ax.plot([p.x for p in front], [p.y for p in front], color=MUTED, lw=1.2, ls=(0, (4, 2)), zorder=1, label="Pareto front")
    ax.set_xlabel(panel.label)
    ax.margins(x=0.14)


def family_of(row: Row) -> str:
    """The branch under which the plot shows a row: the reference and pipelines of several branches stand apart."""
    return "reference" if row.is_reference else "combined" if "+" in row.family else row.family


def _points(table: Table, panel: Panel) -> list[Point]:
    """The rows of a table that lie on the scale, as points of a panel."""
    limit = _limit(table)
    return [
        _point(row, row.perplexity, panel)
        for row in table.rows
        if row.perplexity is not None and row.perplexity <= limit and getattr(row, panel.axis) is not None
    ]


def _point(row: Row, y: float, panel: Panel) -> Point:
    x = getattr(row, panel.axis) * panel.scale
    left, right = (getattr(row, bound) for bound in panel.bounds) if panel.bounds else (None, None)
    return Point(
        row,
        x,
        y,
        low=y if row.perplexity_low is None else min(y, row.perplexity_low),
        high=y if row.perplexity_high is None else max(y, row.perplexity_high),
        left=x if left is None else min(x, left * panel.scale),
        right=x if right is None else max(x, right * panel.scale),
    )


def _front(table: Table, panel: Panel, points: Sequence[Point]) -> list[Point]:
    members = pareto(table.rows, panel.axis)
    return sorted((point for point in points if point.row in members), key=lambda p: (p.y, p.x))


def _limit(table: Table) -> float:
    """Perplexity above which a row is off the scale: so many times the reference or, without one, the best row."""
    known = [row.perplexity for row in table.rows if row.perplexity is not None]
    base = table.reference.perplexity if table.reference and table.reference.perplexity else min(known, default=1.0)
    return OFF_SCALE * base


def _scale(ax: Axes, perplexities: Sequence[float]) -> None:
    """A log axis where perplexities span more than a factor of three, with plain numbers on it."""
    if max(perplexities) > 3 * min(perplexities):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())


def _label(ax: Axes, points: Sequence[Point], front: Sequence[Point], with_engine: bool) -> None:
    """Name the points without overlap: each label takes the best free place around its point, or goes without.

    The reference and the front choose first, and may lie apart with a leader; in a crowd only they are named.
    """
    pixel = DPI / 72
    marks = [_box(ax, (p.x, p.y), (p.x, p.y), pixel * (6 if p.row.is_reference else 3.5)) for p in points]
    lines = [_box(ax, (p.x, p.low), (p.x, p.high), pixel) for p in points] + [
        _box(ax, (p.left, p.y), (p.right, p.y), pixel) for p in points
    ]
    for start, end in itertools.pairwise(front):
        steps = np.linspace(ax.transData.transform((start.x, start.y)), ax.transData.transform((end.x, end.y)), 60)
        lines += [Bbox([a, b]) for a, b in itertools.pairwise(steps)]
    labels: list[Bbox] = []
    crowd = len(points) > _CROWD
    named = [p for p in points if p.row.is_reference or p in front or not crowd]
    for point in sorted(named, key=lambda p: (not p.row.is_reference, p not in front, p.y)):
        name = shorten(f"{point.row.label} · {point.row.engine}" if with_engine else point.row.label, 28)
        box = _place(ax, name, point, point in front or point.row.is_reference, marks, labels, lines)
        labels += [box] if box else []


def _place(
    ax: Axes, name: str, point: Point, bold: bool, marks: Sequence[Bbox], labels: Sequence[Bbox], lines: Sequence[Bbox]
) -> Bbox | None:
    """Write a label inside the axes, off all marks and labels, near its own point, crossing as few lines as can be.

    Returns:
        The box of the label in pixels, or None if there was no room.
    """
    style: dict[str, Any] = {"fontsize": 7.5, "fontweight": "bold" if bold else "normal", "color": INK if bold else MUTED}
    text = ax.annotate(name, (point.x, point.y), (0, 0), textcoords="offset points", parse_math=False, zorder=6, **style)
    frame, size, pixel = ax.get_window_extent(), text.get_window_extent(), DPI / 72
    centre = ax.transData.transform((point.x, point.y))
    taken = [*marks, *labels]
    others = np.array([mark.get_points().mean(axis=0) for mark in marks if _distance(mark, centre) > 0]).reshape(-1, 2)
    best: tuple[float, Bbox] | None = None
    for reach, (dx, dy) in itertools.product((8, 14, 22, 32), _DIRECTIONS):
        left = reach * dx * pixel - (1 - np.sign(dx)) / 2 * size.width
        bottom = reach * dy * pixel - (1 - np.sign(dy)) / 2 * size.height
        box = Bbox.from_bounds(centre[0] + left, centre[1] + bottom, size.width, size.height)
        inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        if inside and not box.count_overlaps(taken):
            nearer = int(np.sum(_distance(box, others) < _distance(box, centre)))
            cost = reach + 15 * box.count_overlaps(lines) + 12 * nearer
            if not bold and (nearer or reach > 14):
                continue
            best = min(best or (cost, box), (cost, box), key=lambda option: option[0])
    if best is None:
        text.remove()
        return None
    text.set_position(((best[1].x0 - centre[0]) / pixel, (best[1].y0 - centre[1]) / pixel))
    end = np.clip(centre, best[1].min, best[1].max)
    if np.hypot(*(end - centre)) > 12 * pixel:
        x, y = ax.transData.inverted().transform([centre, end]).T
        ax.add_line(Line2D(x, y, color=MUTED, linewidth=0.5, zorder=3))
    return best[1]


def _box(ax: Axes, low: tuple[float, float], high: tuple[float, float], grow: float) -> Bbox:
    """The box between two points of the data, in pixels, grown by so many pixels on each side."""
    return Bbox(ax.transData.transform([low, high])).padded(grow)


def _distance(box: Bbox, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pixels from points, shape [..., 2], to the nearest edge of a box, shape [...]; 0 inside."""
    return np.linalg.norm(np.maximum(0, np.maximum(box.min - points, points - box.max)), axis=-1)
