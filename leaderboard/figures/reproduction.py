"""The figure of a paper: published numbers and ours over model size, one colour a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from slimbench.leaderboard.figures.drawing import render
from slimbench.leaderboard.reproduce import Line, Paper

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(paper: Paper, lines: Sequence[Line], parameters: Mapping[str, int], kind: Literal["svg", "png"]) -> bytes:
    """Perplexity over parameters, both on logarithmic axes: hollow and dashed as published, filled as measured.

    Args:
        parameters: Parameters of each model; models without one are left out.
    """
    return render(lambda: _figure(paper, lines, parameters), kind)


def _figure(paper: Paper, lines: Sequence[Line], parameters: Mapping[str, int]) -> Figure:
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    pipelines = list(dict.fromkeys(line.pipeline for line in lines))
    for index, pipeline in enumerate(pipelines):
        colour = colormaps["tab10"](index % 10)
        own = [line for line in lines if line.pipeline == pipeline and line.model in parameters]
        published = sorted((parameters[line.model], line.published) for line in own if line.published is not None)
        measured = sorted((parameters[line.model], line.measured) for line in own if line.measured is not None)
        if published:
            axes.plot(*zip(*published, strict=True), "o--", color=colour, markerfacecolor="none", linewidth=1, alpha=0.8)
        if measured:
            axes.plot(*zip(*measured, strict=True), "o-", color=colour, linewidth=1.5)
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel=f"perplexity on {paper.corpus}")
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    handles = [Line2D([], [], color=colormaps["tab10"](i % 10), label=name) for i, name in enumerate(pipelines)]
    handles += [
        Line2D([], [], color="gray", marker="o", linestyle="--", markerfacecolor="none", label="published"),
        Line2D([], [], color="gray", marker="o", label="measured"),
    ]
    axes.legend(handles=handles, fontsize=8, ncols=2)
    axes.set_title(f"{paper.title}\narXiv:{paper.arxiv}: {paper.table}", fontsize=9, loc="left")
    return figure
