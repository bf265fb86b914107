"""Decode time against the bytes that a step reads, over model sizes, with the bound that the bandwidth of the memory sets."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from matplotlib.figure import Figure

from slimbench.leaderboard.figures.canvas import Plot, log_axis
from slimbench.leaderboard.figures.drawing import DPI, MUTED, render
from slimbench.leaderboard.figures.groups import Group
from slimbench.leaderboard.figures.labels import Named, place
from slimbench.leaderboard.rows.row import Row

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#444b54")
_MARKERS = "os^vDPX*"
_APART = 0.1
"""Sizes that differ by less than this factor stand in one column of the plot."""


@dataclass(frozen=True)
class Series:
    """One pipeline on one engine over several models.

    Attributes:
        points: For each model its name, resident bytes of the weights and milliseconds of a decode step, smallest first.
        gbs: Median read bandwidth while they were measured, GB/s; copy bandwidth where reads were not measured everywhere.
        bandwidth: Which of them: `read` or `copy`.
    """

    name: str
    setting: str
    points: tuple[tuple[str, int, float], ...]
    gbs: float
    bandwidth: str


def series(board: Sequence[Row]) -> list[Series]:
    """Pipelines that were measured on at least two models under one speed protocol and hardware; those of the largest such group."""
    groups: dict[tuple[str, ...], dict[tuple[str, str], list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in board:
        if row.decode_tokens_per_s and row.weight_bytes and row.copy_bandwidth_gbs:
            groups[row.hardware, row.fingerprint, row.speed_protocol, row.speed_point or ""][row.pipeline, row.path_label].append(row)
    found = [_group(setting, paths) for setting, paths in groups.items()]
    return max(found, key=lambda drawn: sum(len(s.points) for s in drawn), default=[])


def _group(setting: tuple[str, ...], paths: dict[tuple[str, str], list[Row]]) -> list[Series]:
    drawn = []
    for (pipeline, path), rows in paths.items():
        by_model = {row.model: row for row in rows}
        if len(by_model) < 2:
            continue
        points = sorted(
            ((r.model, r.weight_bytes or 0, 1000 / (r.decode_tokens_per_s or 1)) for r in by_model.values()), key=lambda p: p[1]
        )
        reads, copies = ([r.read_bandwidth_gbs for r in by_model.values()], [r.copy_bandwidth_gbs for r in by_model.values()])
        bandwidth, readings = ("copy", copies) if None in reads else ("read", reads)
        gbs = median(reading or 0 for reading in readings)
        drawn.append(Series(f"{pipeline} · {path}", f"{setting[0]} · {setting[2]}", tuple(points), gbs, bandwidth))
    return drawn


def plot(drawn: Sequence[Series]) -> Plot:
    """The plot with its words."""
    reading = f"The dashed line is the least time that the bytes of a step need at {_roof(drawn)[1]}, as measured."
    group = Group((), "all models", drawn[0].setting)
    return Plot("sizes", group, "Decode time against size", reading, f"{len(drawn)} pipelines and engines.", lambda: _figure(drawn))


def _roof(drawn: Sequence[Series]) -> tuple[float, str]:
    """GB/s of all that is drawn, and the same in words: `44 GB/s, the read bandwidth`."""
    kind = "copy" if any(item.bandwidth == "copy" for item in drawn) else "read"
    gbs = median(item.gbs for item in drawn if item.bandwidth == kind)
    return gbs, f"{gbs:.0f} GB/s, the {kind} bandwidth"


def draw(drawn: Sequence[Series], kind: Literal["svg", "png"]) -> bytes:
    """The plot as a file; both axes are logarithmic, so that a bandwidth is a straight line."""
    return render(lambda: _figure(drawn), kind)


def _figure(drawn: Sequence[Series]) -> Figure:
    figure = Figure(figsize=(8.4, 5.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for index, item in enumerate(drawn):
        style: dict[str, Any] = {"color": _COLOURS[index % len(_COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}
        axes.plot([p[1] / 1e6 for p in item.points], [p[2] for p in item.points], label=item.name, linewidth=1.3, markersize=6, **style)
    gbs, roof = _roof(drawn)
    ends = [min(p[1] for s in drawn for p in s.points), max(p[1] for s in drawn for p in s.points)]
    axes.plot(
        [e / 1e6 for e in ends],
        [e / gbs / 1e6 for e in ends],
        color=MUTED,
        linestyle="--",
        label=f"bound at {roof}",
    )
    axes.margins(x=0.1)
    log_axis(axes, "x")
    log_axis(axes, "y")
    axes.set(xlabel="resident weights, 10⁶ bytes", ylabel="decode step, ms")
    axes.set_title(drawn[0].setting, fontsize=9, color=MUTED)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    points = [_named(*point) for item in drawn for point in item.points]
    lines = [[(size / 1e6, milliseconds) for _, size, milliseconds in item.points] for item in drawn]
    place(axes, points, lines, [_named(*point) for point in _once(drawn)])
    return figure


def _once(drawn: Sequence[Series]) -> list[tuple[str, int, float]]:
    """Of the points of a model that lie above each other the fastest: it bears the name."""
    fastest: dict[tuple[str, int], tuple[str, int, float]] = {}
    for point in sorted((point for item in drawn for point in item.points), key=lambda point: point[2]):
        column = round(math.log(point[1]) / _APART)
        fastest.setdefault((point[0], column), point)
    return list(fastest.values())


def _named(model: str, size: int, milliseconds: float) -> Named:
    x, y = size / 1e6, milliseconds
    return Named(model, x, y, (y, y, x, x))
