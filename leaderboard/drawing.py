"""One style for every figure. The same data give the same bytes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DPI = 160
INK, MUTED, GRID = "#1f2328", "#6e7781", "#d0d7de"
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "slimbench",
}


def render(make: Callable[[], Figure], kind: Literal["svg", "png"]) -> bytes:
    """A figure as a file.

    Args:
        make: Draws it; called with the style in force.
    """
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure = make()
        FigureCanvasAgg(figure)
        out = io.BytesIO()
        metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        figure.savefig(out, format=kind, dpi=DPI, metadata=metadata, facecolor="white")
    return out.getvalue()
