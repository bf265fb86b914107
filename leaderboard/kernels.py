"""The kernel benchmark as a plot: achieved share of the copy bandwidth, and speed against the dense product."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
from matplotlib.figure import Figure

from harness.store import write_atomically
from leaderboard.drawing import DPI, INK, MUTED, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DENSE = "torch linear"


def plot(path: Path) -> list[Path]:
    """Draw the table that a kernel benchmark wrote, PNG and SVG beside it."""
    table, written = pd.read_csv(path), []
    for kind in ("png", "svg"):
        written.append(path.with_suffix(f".{kind}"))
        write_atomically(written[-1], draw(table, kind))
    return written


def draw(table: pd.DataFrame, kind: Literal["svg", "png"]) -> bytes:
    """A row of panels for each model of a kernel benchmark, for the largest of its layers.

    Args:
        table: Columns as of `harness.bench.KernelRow`.
    """
    return render(lambda: _figure(table), kind)


def _figure(table: pd.DataFrame) -> Figure:
    models = list(dict.fromkeys(table["model"]))
    figure = Figure(figsize=(11, 0.8 + 2.9 * len(models)), dpi=DPI, layout="constrained")
    axes = figure.subplots(len(models), 2, squeeze=False)
    for (left, right), model in zip(axes, models, strict=True):
        layer = _largest(table[table["model"] == model])
        title = f"{model} · {layer['outputs'].iloc[0]} × {layer['inputs'].iloc[0]}"
        _lines(left, layer, "bandwidth_fraction", 100)
        _lines(right, layer, "speedup", 1)
        left.set(title=title, ylabel="% of the copy bandwidth")
        right.set(title=title, ylabel="times as fast as dense")
        right.axhline(1, color=MUTED, linewidth=0.8)
    axes[0][1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    figure.suptitle(f"{table['hardware'].iloc[0]} · torch {table['torch'].iloc[0]}", fontsize=9)
    return figure


def _largest(table: pd.DataFrame) -> pd.DataFrame:
    largest = int((table["outputs"] * table["inputs"]).to_numpy().argmax())
    same = (table["outputs"] == table["outputs"].iloc[largest]) & (table["inputs"] == table["inputs"].iloc[largest])
    return table[same]


def _lines(axes: Axes, layer: pd.DataFrame, column: str, factor: float) -> None:
    batches = sorted(layer["batch"].unique())
    for (kernel, bits, group), rows in layer.groupby(["kernel", "bits", layer["group_size"].fillna(0).astype(int)], sort=False):
        name = f"{kernel} · {bits} bit" + (f", groups of {group}" if group else "")
        style: dict[str, Any] = {"color": INK, "linestyle": "--"} if kernel == DENSE else {}
        axes.plot(rows["batch"], factor * rows[column], marker="o", markersize=3, linewidth=1.2, label=name, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows of inputs")
