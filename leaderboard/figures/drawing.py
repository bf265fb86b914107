"""One style for every figure. The same data give the same bytes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from slimbench.util.files import write_atomically

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
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "slimbench",
    "pdf.fonttype": 42,
}
Kind = Literal["svg", "png", "pdf"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_METADATA: dict[Kind, dict[str, None]] = {
    "svg": {"Date": None, "Creator": None},
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def render(make: Callable[[], Figure], kind: Kind) -> bytes:
    """A figure as a file.

    Args:
        make: Draws it; called with the style in force.
    """
    return render_all(make, [kind])[kind]


def render_all(make: Callable[[], Figure], kinds: Sequence[Kind] = KINDS) -> dict[Kind, bytes]:
    """A figure as a file of each kind, made and laid out once; each has the bytes that `render` gives."""
    files: dict[Kind, bytes] = {}
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure = make()
        FigureCanvasAgg(figure)
        if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        for kind in kinds:
            out = io.BytesIO()
            figure.savefig(out, format=kind, dpi=DPI, metadata=_METADATA[kind], facecolor="white")
            files[kind] = _fewer_colours(out) if kind == "png" else out.getvalue()
    return files


def write_beside(table: Path, draw: Callable[[Literal["png", "svg"]], bytes]) -> list[Path]:
    """Write a figure of a table beside it, as PNG and SVG; the files."""
    files = table.with_suffix(".png"), table.with_suffix(".svg")
    write_atomically(files[0], draw("png"))
    write_atomically(files[1], draw("svg"))
    return list(files)


def _fewer_colours(png: io.BytesIO) -> bytes:
    """The picture with a palette of 256 colours: less than half of the bytes, and no difference that can be seen in a line drawing."""
    from PIL import Image

    with Image.open(png) as picture:
        palette = picture.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    out = io.BytesIO()
    palette.save(out, format="png", optimize=True, dpi=(DPI, DPI))
    return out.getvalue()
