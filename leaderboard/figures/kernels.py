"""The kernel benchmark as a plot: achieved share of the read bandwidth, and speed against the dense product.

Tables of earlier versions have no read bandwidth: theirs is the share of the copy bandwidth, and says so.

With one batch every layer is a dot beside the name of the kernel; with several the largest layer of each model is a line over them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from slimbench.leaderboard.figures.canvas import canvas, category_axis, legend, side_legend
from slimbench.leaderboard.figures.drawing import DPI, INK, MUTED, render, write_beside
from slimbench.leaderboard.figures.palette import Look, Palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DENSE = "torch linear"
_ROW, _SPREAD = 0.36, 0.62


class _Panel(NamedTuple):
    """A column of the table as it is shown, and the value at which a line stands."""

    column: str
    factor: float
    label: str
    line: float


def _panels(table: pd.DataFrame) -> tuple[_Panel, ...]:
    return (
        _Panel("bandwidth_fraction", 100, f"% of the {_roof(table)} bandwidth", 100),
        _Panel("speedup", 1, "times as fast as dense", 1),
    )


def _roof(table: pd.DataFrame) -> str:
    return "read" if "read_gbs" in table else "copy"


def _beyond(table: pd.DataFrame) -> str:
    """What more than 100 % means."""
    if _roof(table) == "copy":
        return "Reads alone can be faster than a copy, so a kernel that does little but read its weight can exceed 100 %."
    defects = int(table["defect"].sum())
    return f"More than 100 % from memory is a defect of the measurement: {defects or 'none'} of {len(table)} rows."


def plot(path: Path) -> list[Path]:
    """Draw the table that a kernel benchmark wrote, PNG and SVG beside it."""
    return write_beside(path, partial(draw, pd.read_csv(path)))


def draw(table: pd.DataFrame, kind: Literal["svg", "png"]) -> bytes:
    """The plot as a file.

    Args:
        table: Columns as of `harness.measure.bench.kernels.KernelRow`.
    """
    table = _labelled(table)
    figure: Callable[[pd.DataFrame], Figure] = _dots if table["batch"].nunique() == 1 else _lines
    return render(lambda: figure(table), kind)


def _labelled(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the names of its subjects and layers."""
    layer = table["outputs"].astype(str) + " × " + table["inputs"].astype(str)
    return table.assign(subject=table.apply(_subject, axis=1), layer=layer)


def _subject(row: pd.Series) -> str:
    return f"{row['kernel']} · {row['bits']} bit" + ("" if pd.isna(row["group_size"]) else f", groups of {row['group_size']:.0f}")


def _setting(table: pd.DataFrame) -> str:
    return f"{table['hardware'].iloc[0]} · torch {table['torch'].iloc[0]}"


def _dots(table: pd.DataFrame) -> Figure:
    """A row for each kernel with a dot for each layer, the largest on top."""
    table = table.sort_values(by=["bits", "kernel", "group_size"], ascending=[False, True, True], kind="stable")
    subjects, models = list(dict.fromkeys(table["subject"])), list(dict.fromkeys(table.sort_index()["model"]))
    palette = Palette(tuple(models))
    layers = table.assign(size=table["outputs"] * table["inputs"]).sort_values("size", ascending=False)
    order = list(dict.fromkeys(zip(layers["model"], layers["layer"], strict=True)))
    rows = table["batch"].iloc[0]
    caption = (
        f"Products at batch {rows}: median of repeated calls, lines are 95 % intervals. Each dot is a layer, the "
        f"largest of them ({order[0][1]}) on top; hollow where the weight may lie in the cache. {_beyond(table)}"
    )
    height = 1.7 + _ROW * len(subjects)
    panels = _panels(table)
    figure, axes = canvas("Packed and dense products", _setting(table), caption, 11, height, len(panels), sharey=True)
    for ax, panel in zip(axes, panels, strict=True):
        ax.axvline(panel.line, color=MUTED, linewidth=0.8)
        for model in models:
            _layers(ax, panel, table[table["model"] == model], subjects, order, palette.look(model))
        ax.set_xlim(left=0)
        ax.set_xlabel(panel.label)
        category_axis(ax, subjects)
    legend(axes[-1], *axes[-1].get_legend_handles_labels())
    return figure


def _layers(ax: Axes, panel: _Panel, rows: pd.DataFrame, subjects: list[str], order: list[tuple[str, str]], look: Look) -> None:
    """The dots of one model."""
    step = _SPREAD / max(1, len(order) - 1)
    places = zip(rows["subject"], rows["model"], rows["layer"], strict=True)
    y = [subjects.index(subject) + step * order.index((model, layer)) - _SPREAD / 2 for subject, model, layer in places]
    x = panel.factor * rows[panel.column]
    reach = [x - x * rows["microseconds"] / rows["high"], x * rows["microseconds"] / rows["low"] - x]
    ax.errorbar(x, y, xerr=reach, fmt="none", ecolor=look.colour, elinewidth=0.9, alpha=0.5)
    fills = [look.colour if reads == "memory" else "white" for reads in rows["reads"]]
    ax.scatter(x, y, s=16, c=fills, edgecolors=look.colour, linewidths=0.8, marker=look.marker, zorder=3)
    ax.scatter([], [], s=16, c=look.colour, marker=look.marker, label=rows["model"].iloc[0])


def _lines(table: pd.DataFrame) -> Figure:
    """A row of panels for each model, for the largest of its layers."""
    models = list(dict.fromkeys(table["model"]))
    palette = Palette(tuple(name for name in dict.fromkeys(table["subject"]) if not name.startswith(DENSE)))
    figure = Figure(figsize=(11, 0.8 + 2.9 * len(models)), dpi=DPI, layout="constrained")
    panels = _panels(table)
    axes = figure.subplots(len(models), len(panels), squeeze=False)
    for row, model in zip(axes, models, strict=True):
        layer = _largest(table[table["model"] == model])
        for ax, panel in zip(row, panels, strict=True):
            ax.axhline(panel.line, color=MUTED, linewidth=0.8)
            _over_batch(ax, panel, layer, palette)
            ax.set_title(f"{model} · {layer['layer'].iloc[0]}", parse_math=False)
    side_legend(axes[0][-1], *axes[0][-1].get_legend_handles_labels())
    figure.suptitle(_setting(table), fontsize=9, parse_math=False)
    return figure


def _largest(table: pd.DataFrame) -> pd.DataFrame:
    largest = int((table["outputs"] * table["inputs"]).to_numpy().argmax())
    return table[table["layer"] == table["layer"].iloc[largest]]


def _over_batch(ax: Axes, panel: _Panel, layer: pd.DataFrame, palette: Palette) -> None:
    batches = sorted(layer["batch"].unique())
    for name, rows in layer.groupby("subject", sort=False):
        look = palette.look(str(name))
        style: dict[str, Any] = {"color": look.colour, "marker": look.marker, "linestyle": look.dashes}
        if str(name).startswith(DENSE):
            style = {"color": INK, "marker": "*", "linestyle": ":"}
        ax.plot(rows["batch"], panel.factor * rows[panel.column], markersize=4, linewidth=1.2, label=name, **style)
    ax.set_xscale("log", base=2)
    ax.set_xticks(batches, [str(batch) for batch in batches])
    ax.set_ylim(bottom=0)
    ax.set_xlabel("rows of inputs")
    ax.set_ylabel(panel.label)
