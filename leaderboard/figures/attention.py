"""The attention benchmark as a plot: time, temporary memory and error over the length of a text, a row of panels for each dtype."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from slimbench.leaderboard.figures.canvas import CAPTION, side_legend
from slimbench.leaderboard.figures.drawing import DPI, MUTED, render, write_beside
from slimbench.leaderboard.figures.palette import Look, Palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class _Panel(NamedTuple):
    """A column of the table as it is shown."""

    column: str
    factor: float
    label: str


_PANELS = (
    _Panel("milliseconds", 1, "ms"),
    _Panel("peak_bytes", 1e-6, "MB of temporary memory"),
    _Panel("relative_error", 1, "relative error to float64"),
)


def plot(path: Path) -> list[Path]:
    """Draw the table that an attention benchmark wrote, PNG and SVG beside it."""
    return write_beside(path, partial(draw, pd.read_csv(path)))


def draw(table: pd.DataFrame, kind: Literal["svg", "png"]) -> bytes:
    """The plot as a file.

    Args:
        table: Columns as of `harness.measure.bench.attention.AttentionRow`.
    """
    return render(lambda: _figure(table), kind)


def growth(rows: pd.DataFrame) -> float | None:
    """The exponent e with which temporary memory grows as length^e, between the two longest texts; None where it is not known."""
    known = rows.dropna(subset=["peak_bytes"]).sort_values("length").tail(2)
    lengths, sizes = known["length"].to_list(), known["peak_bytes"].to_list()
    return math.log(sizes[1] / sizes[0]) / math.log(lengths[1] / lengths[0]) if len(sizes) == 2 and min(sizes) > 0 else None


def _figure(table: pd.DataFrame) -> Figure:
    dtypes = list(dict.fromkeys(table["dtype"]))
    palette = Palette(tuple(dict.fromkeys(table["implementation"])))
    figure = Figure(figsize=(11, 1.0 + 2.9 * len(dtypes)), dpi=DPI, layout="constrained")
    axes = figure.subplots(len(dtypes), len(_PANELS), squeeze=False)
    for row, dtype in zip(axes, dtypes, strict=True):
        part = table[table["dtype"] == dtype]
        for ax, panel in zip(row, _PANELS, strict=True):
            _over_length(ax, panel, part, palette)
        row[0].set_title(dtype, loc="left", parse_math=False)
        side_legend(row[-1], *row[-1].get_legend_handles_labels())
    first = table.iloc[0]
    setting = f"Causal attention · {first['heads']} heads of {first['width']} · {first['hardware']} · torch {first['torch']}"
    figure.suptitle(setting, fontsize=9, parse_math=False)
    caption = (
        "Median of repeated calls in turn, bars are 95 % intervals. Temporary memory is what a call holds at most beyond its inputs; "
        "T^e: how it grows between the two longest texts."
    )
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=7.5, color=MUTED, parse_math=False).set_gid(CAPTION)
    return figure


def _over_length(ax: Axes, panel: _Panel, table: pd.DataFrame, palette: Palette) -> None:
    lengths = sorted(table["length"].unique())
    ax.set_xscale("log", base=2)
    ax.set_yscale("log" if (table[panel.column] > 0).any() else "linear")
    for name, rows in table.groupby("implementation", sort=False):
        look, shown = palette.look(str(name)), rows[rows[panel.column] > 0]
        exponent = growth(rows)
        label = f"{name}, memory T^{exponent:.1f}" if exponent is not None else str(name)
        _line(ax, panel, shown, look, label)
    ax.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=45)
    ax.set_xlabel("tokens")
    ax.set_ylabel(panel.label)


def _line(ax: Axes, panel: _Panel, rows: pd.DataFrame, look: Look, label: str) -> None:
    values = panel.factor * rows[panel.column]
    reach = [values - panel.factor * rows["low"], panel.factor * rows["high"] - values] if panel.column == "milliseconds" else None
    style: dict[str, Any] = {"color": look.colour, "marker": look.marker, "linestyle": look.dashes}
    ax.errorbar(rows["length"], values, yerr=reach, markersize=4, linewidth=1.2, elinewidth=0.9, label=label, **style)
