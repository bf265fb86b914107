"""Names beside points, without overlap."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from leaderboard.drawing import DPI, INK, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PIXEL = DPI / 72
_LEADER_FROM = 12
_STEP = 10
_REACHES = (8, 14, 22, 32, 46, 64)
_DIRECTIONS = ((1, 0), (0.7, 0.7), (0.7, -0.7), (-1, 0), (0, 1), (0, -1), (-0.7, 0.7), (-0.7, -0.7), (0.4, 0.9), (0.4, -0.9), (-0.4, 0.9))


@dataclass(frozen=True)
class Named:
    """A point with its name.

    Attributes:
        ends: Low and high end of its vertical bar, left and right end of its horizontal one; the values themselves without.
        first: It chooses its place before the others, and stands out.
        size: Radius of its mark in points.
    """

    name: str
    x: float
    y: float
    ends: tuple[float, float, float, float]
    first: bool = False
    size: float = 3.5
    colour: str = MUTED


def place(ax: Axes, points: Sequence[Named], paths: Sequence[Sequence[tuple[float, float]]] = (), named: Sequence[Named] = ()) -> int:
    """Name points: each label takes the best free place around its point, with a leader where that is far, or goes without.

    The layout of the figure must be final.

    Args:
        points: All points that labels must not cover.
        paths: Lines in the data that labels should not cross.
        named: The points to name; all of them if none is given.

    Returns:
        How many found no place.
    """
    marks = [_box(ax, (p.x, p.y), (p.x, p.y), PIXEL * p.size) for p in points]
    lines = [_box(ax, (p.x, p.ends[0]), (p.x, p.ends[1]), PIXEL) for p in points] + [
        _box(ax, (p.ends[2], p.y), (p.ends[3], p.y), PIXEL) for p in points
    ]
    for path in paths:
        for start, end in itertools.pairwise(path):
            first, last = ax.transData.transform([start, end])
            steps = np.linspace(first, last, 2 + int(np.hypot(*(last - first)) / _STEP))
            lines += [Bbox([a, b]) for a, b in itertools.pairwise(steps)]
    labels: list[Bbox] = []
    leaders: list[Bbox] = []
    homeless = 0
    for point in sorted(named or points, key=lambda p: (not p.first, p.y, p.x)):
        box = _place(ax, point, marks, labels, leaders, lines)
        labels += [box] if box else []
        homeless += box is None
    return homeless


def _place(
    ax: Axes, point: Named, marks: Sequence[Bbox], labels: Sequence[Bbox], leaders: list[Bbox], lines: Sequence[Bbox]
) -> Bbox | None:
    """Write a label inside the axes, off all marks, labels and leaders, near its own point, crossing as few lines as can be.

    A new leader is added to `leaders`.

    Returns:
        The box of the label in pixels, or None if there was no room.
    """
    style: dict[str, Any] = {
        "fontsize": 7.5,
        "fontweight": "bold" if point.first else "normal",
        "color": INK if point.first else point.colour,
    }
    text = ax.annotate(point.name, (point.x, point.y), (0, 0), textcoords="offset points", parse_math=False, zorder=6, **style)
    text.set_gid("label")
    frame, size = ax.get_window_extent(), text.get_window_extent()
    centre = ax.transData.transform((point.x, point.y))
    taken, strangers = [*marks, *labels, *leaders], [mark for mark in marks if _distance(mark, centre) > 0]
    others = np.array([mark.get_points().mean(axis=0) for mark in strangers]).reshape(-1, 2)
    best: tuple[float, Bbox] | None = None
    for reach, (dx, dy) in itertools.product(_REACHES, _DIRECTIONS):
        left = reach * dx * PIXEL - (1 - np.sign(dx)) / 2 * size.width
        bottom = reach * dy * PIXEL - (1 - np.sign(dy)) / 2 * size.height
        box = Bbox.from_bounds(centre[0] + left, centre[1] + bottom, size.width, size.height)
        inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        if not inside or box.padded(0.5 * PIXEL).count_overlaps(taken):
            continue
        far, leader = _leader(centre, box)
        nearer = int(np.sum(_distance(box, others) < _distance(box, centre)))
        cost = reach + 15 * box.count_overlaps(lines) + (4 if far else 12) * nearer
        if (best is None or cost < best[0]) and not any(other.count_overlaps(leader) for other in (*labels, *strangers) if far):
            best = cost, box
    if best is None:
        text.remove()
        return None
    text.set_position(((best[1].x0 - centre[0]) / PIXEL, (best[1].y0 - centre[1]) / PIXEL))
    far, leader = _leader(centre, best[1])
    if far:
        x, y = ax.transData.inverted().transform([centre, np.clip(centre, best[1].min, best[1].max)]).T
        ax.add_line(Line2D(x, y, color=MUTED, linewidth=0.5, zorder=3))
        leaders += leader
    return best[1]


def _leader(centre: NDArray[np.float64], box: Bbox) -> tuple[bool, list[Bbox]]:
    """Whether a label is so far that it needs a line to its point, and that line in small boxes."""
    end = np.clip(centre, box.min, box.max)
    if np.hypot(*(end - centre)) <= _LEADER_FROM * PIXEL:
        return False, []
    steps = np.linspace(centre, end, 12)[:-1]
    return True, [Bbox([a, b]) for a, b in itertools.pairwise(steps)]


def _box(ax: Axes, low: tuple[float, float], high: tuple[float, float], grow: float) -> Bbox:
    """The box between two points of the data, in pixels, grown by so many pixels on each side."""
    return Bbox(ax.transData.transform([low, high])).padded(grow)


def _distance(box: Bbox, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pixels from points, shape [..., 2], to the nearest edge of a box, shape [...]; 0 inside."""
    return np.linalg.norm(np.maximum(0, np.maximum(box.min - points, points - box.max)), axis=-1)
