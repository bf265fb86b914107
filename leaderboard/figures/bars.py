"""Bars: where the memory goes, and which answers change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slimbench.harness.stats.significance import LEVEL, holm
from slimbench.leaderboard.figures.canvas import Plot, canvas, category_axis, legend
from slimbench.leaderboard.figures.drawing import INK, MUTED
from slimbench.leaderboard.figures.groups import Group, Unplottable, left_out
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.tables.format import decimal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_BARS = 40
_PARTS = (
    ("weight_bytes", "weights", "#0072b2"),
    ("kv_cache_bytes", "KV cache", "#e69f00"),
    ("activation_bytes", "activations and workspace", "#009e73"),
)
_WRONG, _RIGHT = "#d55e00", "#0072b2"


def memory(group: Group) -> Plot:
    """Stacked bars of weights, KV cache and activations at the first speed point, the least memory first.

    Raises:
        Unplottable: No row has its memory measured in parts.
    """
    whole = [row for row in group.rows if row.weight_bytes and row.kv_cache_bytes]
    if not whole:
        raise Unplottable("no row was run for speed, where KV cache and activations are measured")
    rows = sorted(whole, key=lambda row: (_total(row), group.name(row)))[:MOST_BARS]
    point = next((row.speed_point for row in rows if row.speed_point), "unknown point")
    unknown = sum(row.activation_bytes is None for row in rows)
    note = f"At {point}. The number is the sum."
    note += f" The peak of {unknown} rows could not be read: their sum lacks activations (+)." if unknown else ""
    note += " Weights that an engine keeps elsewhere until their layer computes are not in it." if any(map(_offloads, rows)) else ""
    note += f" The {len(whole) - len(rows)} largest are left out." if len(whole) > len(rows) else ""
    text = " ".join(filter(None, [note, left_out(group, whole, "memory in parts")]))
    title = "Memory while decoding"

    def make() -> Figure:
        figure, (ax,) = canvas(f"{title}: {group.title}", group.setting, text, 9.4, 1.9 + 0.27 * len(rows))
        start = [0.0] * len(rows)
        for key, name, colour in _PARTS:
            widths = [(getattr(row, key) or 0) / 1e6 for row in rows]
            ax.barh(range(len(rows)), widths, left=start, height=0.68, color=colour, edgecolor="white", linewidth=0.6, label=name)
            start = [a + b for a, b in zip(start, widths, strict=True)]
        for place, (row, end) in enumerate(zip(rows, start, strict=True)):
            more = "" if row.activation_bytes is not None else " +"
            ax.annotate(f"{decimal(1)(end)}{more}", (end, place), (4, 0), textcoords="offset points", va="center", fontsize=7.5, color=INK)
        category_axis(ax, [group.name(row, 52) for row in rows])
        _bold_references(ax, rows)
        ax.set_xlim(0, 1.09 * max(start))
        ax.set_xlabel("MB  (← less is better)")
        legend(ax)
        return figure

    dense = next((row for row in whole if row.is_reference and row.engine_label == rows[0].engine_label), None)
    reading = f"{group.name(rows[0])} takes least, {_megabytes(rows[0])} MB"
    reading += f"; on that engine the dense model takes {_megabytes(dense)} MB." if dense and dense is not rows[0] else "."
    return Plot("memory", group, title, reading, text, make)


def _megabytes(row: Row) -> str:
    return decimal(1, 1e-6)(_total(row))


def _offloads(row: Row) -> bool:
    return bool(row.offloaded_bytes)


def _total(row: Row) -> int:
    return sum(getattr(row, key) or 0 for key, _, _ in _PARTS)


def _bold_references(ax: Axes, rows: Sequence[Row]) -> None:
    for label, row in zip(ax.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row.is_reference else "normal")


def flips(group: Group) -> Plot:
    """Answers that turned wrong to the left, answers that turned right to the right; the best balance first.

    Raises:
        Unplottable: No row answers the items of its reference.
    """
    whole = [row for row in group.rows if row.flips_to_wrong is not None and row.flips_to_right is not None]
    if not whole:
        raise Unplottable("no row answers the zero-shot items of its reference")
    ordered = sorted(whole, key=lambda row: ((row.flips_to_wrong or 0) - (row.flips_to_right or 0), row.flips_to_wrong, group.name(row)))
    rows = ordered[:MOST_BARS]
    tested = [row for row in whole if row.mcnemar_p is not None]
    clear = {
        id(row) for row, p in zip(tested, holm([row.mcnemar_p or 0 for row in tested]), strict=True) if p < LEVEL
    }  # over all rows of the group, not only those drawn
    note = (
        f"Items whose answer differs from the dense model's, over all tasks. * The two directions differ significantly "
        f"(McNemar's exact test, Holm's correction over {len(tested)} rows, {100 * LEVEL:.0f} %)."
    )
    note += f" The {len(whole) - len(rows)} rows that lose most are left out." if len(whole) > len(rows) else ""
    base = [row for row in group.rows if row.is_reference and row.accuracy is not None]
    text = " ".join(filter(None, [note, left_out(group, [*whole, *base], "answers to the reference's items")]))
    title = "Answers that changed"

    def make() -> Figure:
        figure, (ax,) = canvas(f"{title}: {group.title}", group.setting, text, 9, 2 + 0.27 * len(rows))
        wrong, right = [row.flips_to_wrong or 0 for row in rows], [row.flips_to_right or 0 for row in rows]
        places = range(len(rows))
        ax.barh(places, [-count for count in wrong], height=0.68, color=_WRONG, label="right → wrong")
        ax.barh(places, right, height=0.68, color=_RIGHT, label="wrong → right", hatch="///", edgecolor="white", linewidth=0)
        for place in places:
            for count, side in ((wrong[place], -1), (right[place], 1)):
                style: dict[str, Any] = {"va": "center", "ha": "left" if side > 0 else "right", "fontsize": 7.5, "color": INK}
                ax.annotate(str(count), (side * count, place), (4 * side, 0), textcoords="offset points", **style)
        category_axis(ax, [f"{group.name(row, 42)}{' *' if id(row) in clear else ''}" for row in rows])
        reach = max(*wrong, *right, 1)
        ax.set_xlim(-1.12 * max(*wrong, 0.2 * reach), 1.12 * max(*right, 0.2 * reach))
        ax.axvline(0, color=MUTED, lw=0.9)
        ax.xaxis.set_major_formatter(lambda v, _: f"{abs(v):g}")
        ax.set_xlabel("items")
        legend(ax)
        return figure

    best = f"{group.name(rows[0])} ({rows[0].flips_to_wrong} turned wrong, {rows[0].flips_to_right} right)"
    reading = f"The best balance has {best}; of {len(whole)} rows, {len(clear)} turned significantly more answers one way than the other."
    return Plot("flips", group, title, reading, text, make)
