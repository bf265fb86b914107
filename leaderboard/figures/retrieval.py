"""Facts that are found behind long contexts, over the bytes that are held of these and the time of a step behind them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimbench.leaderboard.compare.retrieval import SHARES
from slimbench.leaderboard.figures.canvas import Plot, canvas, side_legend, spread_axis
from slimbench.leaderboard.figures.drawing import INK, MUTED
from slimbench.leaderboard.figures.groups import Group, Unplottable, left_out
from slimbench.leaderboard.figures.palette import look_of, method_of
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.tables.format import decimal, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LENGTHS = 3


@dataclass(frozen=True)
class Across:
    """What stands on the horizontal axis.

    Attributes:
        key: Of a context of a row (`Retrieval.contexts`).
        scale: From there to the axis.
        name: End of file names.
        less: How a sentence calls what has less of it than dense.
        unit: Of the axis.
    """

    key: str
    scale: float
    label: str
    name: str
    less: str
    unit: str


HELD_BYTES = Across(
    "cache_bytes", 1e-6, "held of a context, MB  (← less is better)", "bytes", "holds at most half of the bytes of dense", "MB"
)
STEP_MS = Across("step_ms", 1.0, "a step behind it, ms  (← faster is better)", "ms", "takes less time than dense", "ms")
_ENOUGH = {HELD_BYTES: 0.5, STEP_MS: 1.0}
"""Share of dense's below which that is so."""


@dataclass(frozen=True)
class Found:
    """A row at one length, in the units of the axes; scores in per cent, and what is held of a context in bytes."""

    row: Row
    x: float
    held: float
    score: float
    low: float
    high: float


def retrieval(group: Group, x: Across) -> Plot:
    """The score of each row at each length, of several lengths the first few; settings of a method are joined.

    Raises:
        Unplottable: Fewer than two rows beside dense have a score.
    """
    lengths = sorted({int(context["length"] or 0) for row in group.rows for context in row.contexts})[:MOST_LENGTHS]
    found = {length: list(_found(group, length, x)) for length in lengths}
    found = {length: points for length, points in found.items() if sum(not point.row.is_reference for point in points) > 1}
    if not found:
        raise Unplottable("no two rows have a score of facts in long contexts")
    note = (
        "Of the facts that dense finds in contexts of so many tokens, the share that a row finds when it is asked only after it has read "
        "them; bars are 95 % intervals over contexts, lines join the settings of a method, from those that hold the least on."
    )
    note += " The time of a step is not taken in turns with that of dense." if x is STEP_MS else ""
    shown = [point.row for points in found.values() for point in points]
    text = " ".join(filter(None, [note, left_out(group, shown, "a score of facts")]))
    title = f"Facts found in long contexts, over {'the bytes held of them' if x is HELD_BYTES else 'the time of a step'}"

    def make() -> Figure:
        figure, axes = canvas(f"{title}: {group.title}", group.setting, text, 4.2 + 3.1 * len(found), 4.8, len(found), sharey=True)
        for ax, (length, points) in zip(axes, found.items(), strict=True):
            _draw(ax, group, points)
            spread_axis(ax, "x", [point.x for point in points])
            ax.set_title(f"{length:,} tokens", fontsize=9)
            ax.set_xlabel(x.label)
        axes[0].set_ylim(-4, 104)
        axes[0].set_ylabel("facts found of those that dense finds, %  (↑)")
        side_legend(axes[-1], *_entries(axes))
        return figure

    return Plot(f"retrieval-{x.name}", group, title, _reading(group, found, x), text, make)


def _found(group: Group, length: int, x: Across) -> Iterator[Found]:
    for row in group.rows:
        for context in row.contexts:
            if context["length"] == length and context["score"] is not None and context[x.key] is not None:
                score, low, high = (_percent(context, name) for name in ("score", "score_low", "score_high"))
                yield Found(
                    row, x.scale * float(context[x.key] or 0), float(context["cache_bytes"] or 0), score, min(score, low), max(score, high)
                )


def _percent(context: dict[str, Any], name: str) -> float:
    """In per cent; a bound that is unknown is the score."""
    value = context["score"] if context[name] is None else context[name]
    return 100 * float(value)


def _draw(ax: Axes, group: Group, points: Sequence[Found]) -> None:
    methods: dict[str, list[Found]] = {}
    for point in points:
        methods.setdefault("" if point.row.is_reference else method_of(point.row), []).append(point)
    for method, own in sorted(methods.items()):
        look = group.palette.look(method) if method else look_of(own[0].row)
        joined = sorted(own, key=lambda point: (point.held, point.x))
        places, scores = [point.x for point in joined], [point.score for point in joined]
        spread = [[point.score - point.low for point in joined], [point.high - point.score for point in joined]]
        ax.errorbar(places, scores, yerr=spread, fmt="none", ecolor=look.colour, elinewidth=0.9, alpha=0.45, zorder=2)
        style: dict[str, Any] = {"color": look.colour if method else INK, "marker": look.marker, "ls": look.dashes, "zorder": 3}
        label = shorten(method, 26).lstrip("_") or "dense"
        ax.plot(places, scores, lw=1.3, ms=6 if method else 11, mec="white", mew=0.6, label=label, **style)
    ax.axhline(0, color=MUTED, lw=0.6, zorder=1)


def _entries(axes: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    """Handles and labels of all axes, each label once."""
    entries: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    return list(entries.values()), list(entries)


def _reading(group: Group, found: dict[int, list[Found]], x: Across) -> str:
    """The best of what has little enough, and what has the least of what finds enough, at the first length."""
    length, points = next(iter(found.items()))
    dense = next((point.x for point in points if point.row.is_reference), None)
    if dense is None:
        return f"At {length:,} tokens, nothing {x.less}."
    small = [point for point in points if not point.row.is_reference and point.x <= _ENOUGH[x] * dense]
    most = f"At {length:,} tokens, nothing {x.less}."
    if small:
        best = max(small, key=lambda point: (point.score, -point.x))
        most = f"At {length:,} tokens, of what {x.less}, {group.name(best.row)} finds most: {decimal(0)(best.score)} % of what dense finds."
    least = {share: min((point for point in points if point.score >= 100 * share), key=lambda point: point.x) for share in SHARES}
    takes = [f"{share:.0%} {decimal(1)(point.x)} {x.unit} ({group.name(point.row)})".replace("%", " %") for share, point in least.items()]
    return f"{most} What finds so much of it takes at least: {', '.join(takes)}."
