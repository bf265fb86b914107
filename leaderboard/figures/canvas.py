"""What all figures share: title above, caption below, legend outside, and plain numbers on logarithmic axes."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from slimbench.leaderboard.figures.drawing import DPI, GRID, INK, MUTED, Kind, render, render_all

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

    from slimbench.leaderboard.figures.groups import Group

CHARACTERS_PER_INCH = 16.5
CAPTION = "caption"


@dataclass(frozen=True)
class Plot:
    """A figure that the rows allow.

    Attributes:
        kind: Name in the catalogue.
        group: The rows that it is of.
        title: What it shows.
        reading: What can be read off it, in one sentence.
        caption: How to read it, and which rows it leaves out.
        make: Draws it.
    """

    kind: str
    group: Group
    title: str
    reading: str
    caption: str
    make: Callable[[], Figure]

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.group.stem}"

    def draw(self, kind: Kind) -> bytes:
        """The figure as a file; the same rows give the same bytes."""
        return render(self.make, kind)

    def draw_all(self) -> dict[Kind, bytes]:
        """The figure as a file of each kind."""
        return render_all(self.make)


def canvas(title: str, setting: str, caption: str, width: float, height: float, columns: int = 1, **subplots: Any) -> tuple[Figure, Any]:
    """A figure with its words, and its axes as an array of one row.

    Args:
        width: Inches, as the height.
    """
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **subplots)[0]
    line = line_length(figure)
    whole_parts = re.sub("(?<!·) ", "\N{NO-BREAK SPACE}", title)
    heading = textwrap.wrap(whole_parts, int(0.55 * line), max_lines=2, placeholder=" …")
    figure.suptitle(
        "\n".join(heading).replace("\N{NO-BREAK SPACE}", " "), x=0.01, ha="left", fontsize=11, fontweight="bold", parse_math=False
    )
    words = [*textwrap.wrap(setting, line), *textwrap.wrap(caption, line)]
    figure.supxlabel("\n".join(words), x=0.01, ha="left", fontsize=7.5, color=MUTED, parse_math=False).set_gid(CAPTION)
    return figure, axes


def line_length(figure: Figure) -> int:
    """Characters of the caption that fit in one line."""
    return int(figure.get_figwidth() * CHARACTERS_PER_INCH)


def legend(ax: Axes, *entries: Any) -> None:
    """A legend in lines above the axes, below the title; none where it would say one thing.

    Args:
        entries: Handles and labels; those of the axes if none are given.
    """
    handles, labels = entries or ax.get_legend_handles_labels()
    if len(labels) < 2:
        return
    columns = max(1, min(len(labels), int(ax.bbox.width / DPI * CHARACTERS_PER_INCH / (max(map(len, labels)) + 4))))
    made = ax.legend(
        handles,
        labels,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=columns,
        frameon=False,
        fontsize=8,
        handletextpad=0.4,
        columnspacing=1.2,
    )
    plain(made.get_texts())


def side_legend(ax: Axes, *entries: Any) -> None:
    """A legend right of the axes, for many entries.

    Args:
        entries: Handles and labels; those of the axes if none are given.
    """
    made = ax.legend(*entries, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    plain(made.get_texts())


def plain(texts: Sequence[Text]) -> None:
    """Show dollar signs as they are."""
    for text in texts:
        text.set_parse_math(False)


class _Readable(LogLocator):
    """Ticks of which at least three are in view."""

    def tick_values(self, vmin: float, vmax: float) -> Any:
        found = super().tick_values(vmin, vmax)
        seen = [tick for tick in found if vmin <= tick <= vmax]
        return found if len(seen) > 2 else MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(vmin, vmax)


def log_axis(ax: Axes, which: str, ticks: Sequence[float] | None = None) -> None:
    """A logarithmic axis with plain numbers on it: at 1, 2 and 5, in equal steps where it shows few of these, or where `ticks` says."""
    getattr(ax, f"set_{which}scale")("log")
    axis = getattr(ax, f"{which}axis")
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())
    if ticks is None:
        axis.set_major_locator(_Readable(subs=(1, 2, 5)))
    else:
        axis.set_ticks(list(ticks))
        axis.set_minor_locator(NullLocator())


def spread_axis(ax: Axes, which: str, values: Sequence[float]) -> None:
    """A logarithmic axis where positive values span more than a factor of three."""
    if min(values) > 0 and max(values) > 3 * min(values):
        getattr(ax, f"set_{which}lim")(auto=True)
        log_axis(ax, which)


def loss_axis(ax: Axes, values: Sequence[float], margin: float) -> None:
    """A vertical axis of differences in per cent, linear within the margin and logarithmic beyond, with the margin as a band.

    Args:
        values: What it shows.
        margin: Within which a difference counts as none, above 0.
    """
    low, high = min(0.0, *values), max(0.0, *values)
    ticks = [sign * tick for sign in (-1, 1) for power in range(6) for digit in (1, 2, 5) if (tick := digit * 10**power)]
    ax.set_ylim(auto=True)
    ax.set_yscale("symlog", linthresh=margin, linscale=0.8)
    ax.set_yticks(sorted({0, *(tick for tick in ticks if 1.6 * low - margin <= tick <= 1.6 * high + margin)}))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:+g}".replace("-", "−") if v else "0"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.axhspan(-margin, margin, color=GRID, alpha=0.55, lw=0, zorder=0)


def bit_axis(ax: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis of bits with the usual numbers of bits as its ticks."""
    low, high = min(values), max(values)
    usual = [bits for bits in (0.25, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 12, 16, 32) if 0.8 * low <= bits <= 1.25 * high]
    if low > 0 and len(usual) > 1:
        log_axis(ax, "x", usual)


def category_axis(ax: Axes, names: Sequence[str], size: float = 8.5) -> None:
    """Names down the left side, the first on top."""
    ax.set_yticks(range(len(names)), list(names), fontsize=size, color=INK, parse_math=False)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
