"""Settings of one method joined by a line: perplexity over bits, sparsity and parameters removed, degradation over model size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from slimbench.leaderboard.figures.canvas import Plot, bit_axis, canvas, log_axis, side_legend, spread_axis
from slimbench.leaderboard.figures.drawing import INK, MUTED
from slimbench.leaderboard.figures.groups import Group, Unplottable, left_out, listed, off_scale, unbeaten
from slimbench.leaderboard.figures.labels import Named, place
from slimbench.leaderboard.figures.measures import ACTIVE, BITS, DELTA, HELD, PERPLEXITY, REMOVED, SPARSITY, Measure, Point, front, points
from slimbench.leaderboard.figures.palette import method_of
from slimbench.leaderboard.figures.scatter import UNNAMED, corpus, settle
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.tables.format import decimal, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OFF_SCALE = 20.0
_DENSE_BITS = 15.5
_LEAST_ZEROS = 0.02
_LEAST_REMOVED = 0.001
_FEWER = (BITS, ACTIVE, HELD)
"""Measures of which less compresses more."""


def bits(group: Group) -> Plot:
    """Perplexity over the bits of each method's settings.

    Raises:
        Unplottable: Fewer than two rows store weights in fewer bits.
    """

    def compressed(row: Row) -> bool:
        return row.effective_bits is not None and row.effective_bits < _DENSE_BITS and not row.is_reference

    return _settings(group, BITS, compressed, "compressed weights")


def sparsity(group: Group) -> Plot:
    """Perplexity over the share of zeros that each pruning method's settings make; zeros of a grid in what was cut are not of pruning.

    Raises:
        Unplottable: Fewer than two pruned rows.
    """

    def pruned(row: Row) -> bool:
        is_cut_and_rounded = (row.removed or 0) > _LEAST_REMOVED and "quantization" in row.family
        return "pruning" in row.family and (row.sparsity or 0) > _LEAST_ZEROS and not is_cut_and_rounded

    return _settings(group, SPARSITY, pruned, "zeros in pruned weights")


def removed(group: Group) -> Plot:
    """Perplexity over the share of all parameters that each method's settings take away.

    Raises:
        Unplottable: Fewer than two rows with fewer parameters.
    """

    def smaller(row: Row) -> bool:
        return (row.removed or 0) > _LEAST_REMOVED

    return _settings(group, REMOVED, smaller, "parameters removed")


def active(group: Group) -> Plot:
    """Perplexity over the parameters that take part in a token of the same texts, where that is not the same for all tokens.

    Raises:
        Unplottable: Fewer than two rows whose work was counted while they were scored.
    """

    def acts(row: Row) -> bool:
        return row.scored_active_share is not None and "depth" in row.slots

    return _settings(group, ACTIVE, acts, "parameters that take part")


def held(group: Group) -> Plot:
    """Perplexity over the bytes of the cache that are held for a text, behind a prompt on the average over what is scored; of the texts
    behind which most rows have them.

    Raises:
        Unplottable: Fewer than two rows with caches of different size.
    """

    texts = Counter(row.held_cache_of for row in group.rows if row.held_cache_bytes is not None)
    ((common, _),) = texts.most_common(1) or [(None, 0)]
    whole = group.reference.held_cache_bytes if group.reference and group.reference.held_cache_of == common else None

    def counted(row: Row) -> bool:
        is_other = bool({"cache", "attention"} & set(row.slots)) or (whole is not None and row.held_cache_bytes != whole)
        return row.held_cache_bytes is not None and row.held_cache_of == common and is_other

    return _settings(group, HELD, counted, "bytes of the cache")


def _settings(group: Group, x: Measure, belongs: Callable[[Row], bool], what: str) -> Plot:
    limit = off_scale(group, OFF_SCALE)
    all_of_them = points([row for row in group.rows if belongs(row)], x, PERPLEXITY)
    if len({round(p.x, 1) for p in all_of_them}) < 2:
        raise Unplottable(f"no two rows with a perplexity and different {what}")
    shown, off = [p for p in all_of_them if p.y <= limit], [p for p in all_of_them if p.y > limit]
    reference = group.reference
    note = (
        "Bars are 95 % intervals. A line joins the settings of one method that none of its others beats in both; its other settings "
        "are hollow."
    )
    arrows = f"Arrows at the top: above {OFF_SCALE:.0f} × the reference, with the perplexity." if off else ""
    hidden = left_out(group, [p.row for p in all_of_them] + [row for row in group.rows if row.is_reference], what)
    text = " ".join(filter(None, [note, arrows, hidden]))
    title = f"Perplexity by method and {x.name if x in (BITS, SPARSITY) else what}"

    def make() -> Figure:
        figure, (ax,) = canvas(f"{title}: {group.title}", group.setting, text, 9.4, 6)
        paths = _by_method(ax, shown, off, group, x)
        _across(ax, x, [p.x for p in all_of_them])
        base = [reference.perplexity] if reference and reference.perplexity else []
        spread_axis(ax, "y", [*([limit] if off else []), *(p.y for p in shown), *base])
        ax.margins(x=0.1)
        top = max([limit if off else 0.0, *(p.high for p in shown)])
        paths += _ceiling(ax, top, shown, off, group)
        for dense in base:
            ax.axhline(dense, color=INK, lw=1, ls=(0, (4, 2)), zorder=1, label="dense")
            paths.append([(end, dense) for end in ax.get_xlim()])
        ax.set_xlabel(x.label)
        ax.set_ylabel(f"{corpus(group)}{PERPLEXITY.label}", parse_math=False)
        side_legend(ax)
        unsay = settle(figure, UNNAMED)
        named = [_named(group, p, p.y) for p in shown] + [_named(group, p, top, f" {decimal(0)(p.y)}") for p in off]
        if not place(ax, named, paths):
            unsay()
        return figure

    best = [p.row for p in front(all_of_them, _least(x), PERPLEXITY)]
    return Plot(f"methods-{x.name}", group, title, unbeaten(group, len(all_of_them), best), text, make)


def _across(ax: Axes, x: Measure, values: Sequence[float]) -> None:
    if x is BITS:
        bit_axis(ax, values)
    else:
        most = 1.15 * max(values)
        ax.set_xlim(0, 100 if x is SPARSITY else min(100.0, most) if x is REMOVED else most)


def _named(group: Group, point: Point, y: float, more: str = "") -> Named:
    colour = group.palette.look(method_of(point.row)).ink
    ends = (point.x, point.x) if more else (point.left, point.right)
    return Named(group.name(point.row) + more, point.x, y, (y if more else point.low, y if more else point.high, *ends), colour=colour)


def _by_method(ax: Axes, shown: Sequence[Point], off: Sequence[Point], group: Group, x: Measure) -> list[list[tuple[float, float]]]:
    """Draw the settings of each method with their line, and return the lines. Methods of one setting need no legend: it has its name."""
    methods: dict[str, list[Point]] = {}
    for point in shown:
        methods.setdefault(method_of(point.row), []).append(point)
    several = Counter(method_of(point.row) for point in (*shown, *off))
    paths = []
    for method in sorted(methods, key=lambda m: (group.palette.methods.index(m) if m in group.palette.methods else len(methods), m)):
        look, own = group.palette.look(method), methods[method]
        joined = sorted(front(own, _least(x), PERPLEXITY), key=lambda p: p.x)
        others = [p for p in own if not any(p is member for member in joined)]
        for p in [*joined, *others]:
            spread = [[p.y - p.low], [p.high - p.y]]
            ax.errorbar([p.x], [p.y], yerr=spread, fmt="none", ecolor=look.colour, elinewidth=1, alpha=0.45, zorder=2)
        path = [(p.x, p.y) for p in joined]
        paths.append(path)
        ax.plot(
            [v for v, _ in path],
            [v for _, v in path],
            color=look.colour,
            marker=look.marker,
            ls=look.dashes,
            lw=1.5,
            ms=6.5,
            mec="white",
            mew=0.7,
            zorder=4,
            label=(shorten(method, 26).lstrip("_") or "unnamed") if several[method] > 1 else None,
        )
        if others:
            hollow: dict[str, Any] = {"ms": 6, "mfc": "white", "mec": look.colour, "mew": 1.2, "zorder": 3}
            ax.plot([p.x for p in others], [p.y for p in others], marker=look.marker, ls="none", **hollow)
    return paths


def _least(x: Measure) -> Measure:
    """The measure with less of it taken as better where less compresses more, else with more."""
    return x if x in _FEWER else Measure(x.key, x.label, x.missing, x.name, x.scale, rising=True)


def _ceiling(ax: Axes, top: float, shown: Sequence[Point], off: Sequence[Point], group: Group) -> list[list[tuple[float, float]]]:
    """Arrows at the top of the axes for the points above it, each joined to the nearest setting of its method below.

    Returns:
        Those joints.
    """
    if not off:
        return []
    joints = []
    ax.set_ylim(top=top * 1.12)
    for point in off:
        method = method_of(point.row)
        colour = group.palette.look(method).colour
        ax.plot([point.x], [top], marker="^", ms=7, mfc="white", mec=colour, mew=1.3, ls="none", zorder=5)
        family = [p for p in shown if method_of(p.row) == method]
        if family:
            nearest = min(family, key=lambda p: (abs(p.x - point.x), p.y))
            ax.plot([point.x, nearest.x], [top, nearest.y], color=colour, lw=1.2, ls=":", zorder=2)
            joints.append([(point.x, top), (nearest.x, nearest.y)])
    return joints


def degradation(group: Group) -> Plot:
    """Perplexity above the dense model over its size: one line a pipeline and engine.

    Raises:
        Unplottable: No pipeline was compared with its reference on two models of different size.
    """
    series: dict[str, list[tuple[int, Point]]] = {}
    for point in points((row for row in group.rows if not row.is_reference), DELTA, DELTA):
        if point.row.parameters:
            series.setdefault(group.name(point.row, 40), []).append((point.row.parameters, point))
    drawn = {name: sorted(own, key=lambda pair: pair[0]) for name, own in series.items() if len({size for size, _ in own}) > 1}
    if not drawn:
        models = len({row.parameters for row in group.rows if row.perplexity_delta_percent is not None})
        raise Unplottable(f"no pipeline was compared with its dense model on two sizes of model ({models} here)")
    alone = listed(name for name in series if name not in drawn)
    hidden = left_out(
        group, [r for r in group.rows if r.is_reference or r.perplexity_delta_percent is not None], "difference to a reference"
    )
    note = "Bars are paired 95 % intervals." + (f" Measured on one size only: {alone}." if alone else "")
    text = " ".join(filter(None, [note, hidden]))
    title = "Degradation against model size"

    def make() -> Figure:
        figure, (ax,) = canvas(f"{title}: {group.title}", group.setting, text, 9.4, 5.4)
        for name, own in drawn.items():
            look = group.palette.look(method_of(own[0][1].row))
            sizes, values = [size for size, _ in own], [p.y for _, p in own]
            spread = [[p.y - p.low for _, p in own], [p.high - p.y for _, p in own]]
            style: dict[str, Any] = {"color": look.colour, "marker": look.marker, "ls": look.dashes, "ms": 6.5, "mec": "white", "mew": 0.7}
            ax.errorbar(sizes, values, yerr=spread, lw=1.5, elinewidth=1, label=name.lstrip("_"), **style)
        ax.axhline(0, color=MUTED, lw=0.9)
        lowest = min(p.low for own in drawn.values() for _, p in own)
        if lowest > 0:
            spread_axis(ax, "y", [p.y for own in drawn.values() for _, p in own])
        models = {size: p.row.model for own in drawn.values() for size, p in own}
        log_axis(ax, "x", sorted(models))
        ax.set_xticks(sorted(models), [f"{shorten(models[s], 18)}\n{_count(s)}" for s in sorted(models)], parse_math=False)
        ax.margins(x=0.08)
        ax.set_xlabel("parameters of the dense model")
        ax.set_ylabel(DELTA.label)
        side_legend(ax)
        return figure

    size = max(own[-1][0] for own in drawn.values())
    loss, best = min((own[-1][1].y, name) for name, own in drawn.items() if own[-1][0] == size)
    reading = f"On the largest model, {best} lies lowest, {decimal(1, signed=True)(loss)} % from dense."
    return Plot("degradation", group, title, reading, text, make)


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.3g} B" if parameters >= 1e9 else f"{parameters / 1e6:.0f} M"
