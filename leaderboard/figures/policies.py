"""What policies do while a model runs: perplexity along a stream, and what drafts give."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from slimbench.leaderboard.figures.canvas import Plot, canvas, category_axis, side_legend, spread_axis
from slimbench.leaderboard.figures.drawing import INK, MUTED
from slimbench.leaderboard.figures.groups import Group, Unplottable, left_out
from slimbench.leaderboard.figures.palette import Look, look_of, method_of
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.tables.format import decimal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_DRAFTS = 12


def stream(group: Group) -> Plot:
    """Perplexity along one text that goes through one cache, and the bytes of that cache where they are known.

    Raises:
        Unplottable: No row was scored along a stream.
    """
    rows = [row for row in group.rows if len(row.stretches) > 1]
    if not rows:
        raise Unplottable("no row was scored along a stream")
    holding = [row for row in rows if row.stretch_bytes]
    anew = next((row.recomputed for row in rows if row.recomputed), [])
    notes = ["Each point is a stretch of 1,024 tokens of one text, behind all tokens before it."]
    notes += ["Grey: the dense model, if of the tokens before each the last 512 to 1,023 are computed anew."] if anew else []
    notes += ["Right: the mean bytes of the cache."] if holding else []
    text = " ".join(filter(None, [*notes, left_out(group, rows, "a stream")]))
    title = "Perplexity along a stream"

    def make() -> Figure:
        figure, axes = canvas(f"{title}: {group.title}", group.setting, text, 10.4 if holding else 9.4, 5.2, 2 if holding else 1)
        for row, look in zip(rows, _looks(group, rows), strict=True):
            style: dict[str, Any] = {"color": look.colour, "marker": look.marker, "ls": look.dashes, "ms": 5, "mec": "white", "mew": 0.6}
            style |= {"lw": 1.5, "label": group.name(row).lstrip("_")}
            axes[0].plot(_places(row.stretches), row.stretches, **style)
            if holding:
                axes[1].plot(_places(row.stretch_bytes), [held / 1e6 for held in row.stretch_bytes], **style)
        if anew:
            axes[0].plot(_places(anew), anew, color=MUTED, lw=1.5, zorder=1)
            axes[-1].plot([], [], color=MUTED, lw=1.5, label="dense, computed anew")
        spread_axis(axes[0], "y", [value for row in rows for value in (*row.stretches, *anew)])
        for ax in axes:
            ax.set_xlim(left=0)
            ax.set_xlabel("thousand tokens so far")
        axes[0].set_ylabel("perplexity of the stretch  (↓ lower is better)")
        if holding:
            axes[1].set_ylim(bottom=0)
            axes[1].set_ylabel("cache, MB  (↓ smaller is better)")
        side_legend(axes[-1])
        return figure

    steady = min(rows, key=lambda row: row.stretches[-1])
    first, *_, last = (decimal(1)(value) for value in steady.stretches)
    reading = f"{group.name(steady)} is lowest in the last stretch, {last} (first: {first})."
    bounded = [row for row in rows if not row.is_reference and len(row.stretches) == len(anew)]
    if bounded:
        apart = {group.name(row): max(abs(math.log(a / b)) for a, b in zip(row.stretches, anew, strict=True)) for row in bounded}
        nearest = min(apart, key=lambda name: (apart[name], name))
        reading += f" {nearest} is nearest to dense that is computed anew, {decimal(2)(apart[nearest])} nats apart at most."
    return Plot("stream", group, title, reading, text, make)


def _looks(group: Group, rows: Sequence[Row]) -> Iterator[Look]:
    """A look for each row, that of its method and setting."""
    looks = iter(group.palette.apart(method_of(row) for row in rows if not row.is_reference))
    for row in rows:
        yield look_of(row) if row.is_reference else next(looks)


def _places(values: Sequence[float]) -> list[float]:
    """Thousand tokens at the end of each stretch."""
    return [1.024 * (place + 1) for place in range(len(values))]


def drafts(group: Group) -> Plot:
    """How many tokens the passes of each draft gave, and its speed-up beside the one that these passes should give.

    Raises:
        Unplottable: No row with drafts was timed on texts.
    """
    whole = [row for row in group.rows if "draft" in row.slots and row.predicted_speedup is not None and row.speedup is not None]
    if not whole:
        raise Unplottable("no row with drafts was timed on texts")
    rows = sorted(whole, key=lambda row: (-(row.speedup or 0), group.name(row)))[:MOST_DRAFTS]
    note = (
        "Left: share of the passes that gave so many tokens; 1 is a pass whose first guess was wrong, or without any. "
        "Right: decode time of the dense model on the same texts over that of the row, with its 95 % interval; the hollow mark is what the "
        "counted calls should give by the measured times of passes of so many tokens, and of the parts that guess."
    )
    note += f" The {len(whole) - len(rows)} slowest are left out." if len(whole) > len(rows) else ""
    text = " ".join(filter(None, [note, left_out(group, [*whole, *(row for row in group.rows if row.is_reference)], "drafts on texts")]))
    title = "Tokens of a pass, and speed-up with drafts"

    def make() -> Figure:
        figure, (left, right) = canvas(f"{title}: {group.title}", group.setting, text, 10.4, 2.4 + 0.36 * len(rows), 2, sharey=True)
        _shares(left, rows)
        _speedups(right, rows)
        category_axis(left, [group.name(row, 46) for row in rows])
        return figure

    best = rows[0]
    reading = (
        f"{group.name(best)} is fastest, {decimal(2)(best.speedup or 0)} ×, with {decimal(2)(best.tokens_per_pass or 0)} tokens a pass."
    )
    return Plot("drafts", group, title, reading, text, make)


def _shares(ax: Axes, rows: Sequence[Row]) -> None:
    """Stacked shares of the passes, darker for more tokens."""
    most = max(int(tokens) for row in rows for tokens in row.pass_tokens)
    for place, row in enumerate(rows):
        start, passes = 0.0, sum(row.pass_tokens.values())
        for tokens, count in sorted((int(tokens), count) for tokens, count in row.pass_tokens.items()):
            share, depth = 100 * count / passes, (tokens - 1) / max(1, most - 1)
            ax.barh(place, share, left=start, height=0.68, color=str(0.88 - 0.68 * depth), edgecolor="white", linewidth=0.6)
            if share >= 6:
                ax.annotate(
                    str(tokens), (start + share / 2, place), va="center", ha="center", fontsize=7.5, color="white" if depth > 0.45 else INK
                )
            start += share
    ax.set_xlim(0, 100)
    ax.set_xlabel("passes, %, by the tokens they gave")


def _speedups(ax: Axes, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        value = row.speedup or 0.0
        low, high = row.speedup_low or value, row.speedup_high or value
        ax.errorbar([value], [place], xerr=[[value - low], [high - value]], fmt="o", ms=6, color="#0072b2", elinewidth=1.2, zorder=3)
        ax.plot([row.predicted_speedup or 0.0], [place], marker="D", ms=6, mfc="none", mec="#d55e00", ls="none", zorder=4)
    ax.axvline(1, color=MUTED, lw=0.9)
    ax.set_xlim(left=0)
    ax.set_xlabel("times as fast as dense  (faster is better →)")
