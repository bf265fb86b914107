"""Names beside points, without overlap."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from slimbench.leaderboard.figures.drawing import DPI, INK, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Boxes = NDArray[np.float64]
PIXEL = DPI / 72
_LEADER_FROM = 12
_STEP = 10
_REACHES = (8, 14, 22, 32, 46, 64)
_DIRECTIONS = ((1, 0), (0.7, 0.7), (0.7, -0.7), (-1, 0), (0, 1), (0, -1), (-0.7, 0.7), (-0.7, -0.7), (0.4, 0.9), (0.4, -0.9), (-0.4, 0.9))
_OFFSETS = np.array([(reach * dx, reach * dy) for reach, (dx, dy) in itertools.product(_REACHES, _DIRECTIONS)])
_REACH = np.repeat(_REACHES, len(_DIRECTIONS))


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


def place(
    ax: Axes, points: Sequence[Named], paths: Sequence[Sequence[tuple[float, float]]] = (), named: Sequence[Named] | None = None
) -> int:
    """Name points: each label takes the best free place around its point, with a leader where that is far, or goes without.

    The layout of the figure must be final.

    Args:
        points: All points that labels must not cover.
        paths: Lines in the data that labels should not cross.
        named: The points to name; None for all of them.

    Returns:
        How many found no place.
    """
    marks = np.array([_box(ax, (p.x, p.y), (p.x, p.y), PIXEL * p.size) for p in points]).reshape(-1, 4)
    lines = [_box(ax, (p.x, p.ends[0]), (p.x, p.ends[1]), PIXEL) for p in points]
    lines += [_box(ax, (p.ends[2], p.y), (p.ends[3], p.y), PIXEL) for p in points]
    for path in paths:
        for start, end in itertools.pairwise(path):
            first, last = ax.transData.transform([start, end])
            lines += _between(first, last, 2 + int(np.hypot(*(last - first)) / _STEP))
    written = _Written(marks, np.array(lines).reshape(-1, 4))
    return sum(
        not _place(ax, point, written) for point in sorted(points if named is None else named, key=lambda p: (not p.first, p.y, p.x))
    )


@dataclass
class _Written:
    """What is drawn already, as boxes in pixels, shape [n, 4]: left, bottom, right, top."""

    marks: Boxes
    lines: Boxes
    labels: list[Boxes] = field(default_factory=list)
    leaders: list[Boxes] = field(default_factory=list)


def _place(ax: Axes, point: Named, written: _Written) -> bool:
    """Write a label inside the axes, off all marks, labels and leaders, near its own point, crossing as few lines as can be.

    The label and its leader are added to `written`.

    Returns:
        Whether there was room.
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
    extent = np.array([size.width, size.height])
    low = centre + PIXEL * _OFFSETS - (1 - np.sign(_OFFSETS)) / 2 * extent
    boxes = np.hstack([low, low + extent])
    strangers = written.marks[_distance(written.marks, centre[None])[:, 0] > 0]
    taken = np.vstack([written.marks, *written.labels, *written.leaders])
    inside = (boxes[:, :2] >= frame.min).all(1) & (boxes[:, 2:] <= frame.max).all(1)
    free = inside & ~_overlaps(_padded(boxes, 0.5 * PIXEL), taken).any(1)
    away = _distance(boxes, centre[None])
    nearer = (_distance(boxes, (strangers[:, :2] + strangers[:, 2:]) / 2) < away).sum(1)
    ends = np.clip(centre, boxes[:, :2], boxes[:, 2:])
    far = np.hypot(*(ends - centre).T) > _LEADER_FROM * PIXEL
    cost = np.where(free, _REACH + 15 * _overlaps(boxes, written.lines).sum(1) + np.where(far, 4, 12) * nearer, np.inf)
    for best in np.argsort(cost, kind="stable")[: int(free.sum())]:
        leader = np.array(_between(centre, ends[best], 12)[:-1])
        if far[best] and _overlaps(leader, np.vstack([strangers, *written.labels])).any():
            continue
        left, bottom = (boxes[best, :2] - centre) / PIXEL
        text.set_position((left, bottom))
        if far[best]:
            ax.add_line(Line2D(*ax.transData.inverted().transform([centre, ends[best]]).T, color=MUTED, linewidth=0.5, zorder=3))
            written.leaders.append(leader)
        written.labels.append(boxes[best : best + 1])
        return True
    text.remove()
    return False


def _between(start: NDArray[np.float64], end: NDArray[np.float64], corners: int) -> list[NDArray[np.float64]]:
    """The small boxes that a line from one point to another goes through from corner to corner."""
    steps = np.linspace(start, end, corners)
    return [np.hstack([np.minimum(a, b), np.maximum(a, b)]) for a, b in itertools.pairwise(steps)]


def _box(ax: Axes, low: tuple[float, float], high: tuple[float, float], grow: float) -> NDArray[np.float64]:
    """The box between two points of the data, in pixels, grown by so many pixels on each side."""
    corners = ax.transData.transform([low, high])
    return np.hstack([corners.min(0) - grow, corners.max(0) + grow])


def _padded(boxes: Boxes, grow: float) -> Boxes:
    return boxes + np.array([-grow, -grow, grow, grow])


def _overlaps(ours: Boxes, theirs: Boxes) -> NDArray[np.bool_]:
    """Which boxes have an area or a line in common, shape [ours, theirs]; to touch is not enough."""
    a, b = ours[:, None], theirs[None]
    return np.all((a[..., :2] < b[..., 2:]) & (b[..., :2] < a[..., 2:]), axis=-1)


def _distance(boxes: Boxes, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pixels from points, shape [p, 2], to the nearest edge of each box, shape [boxes, p]; 0 inside."""
    return np.linalg.norm(np.maximum(0, np.maximum(boxes[:, None, :2] - points, points - boxes[:, None, 2:])), axis=-1)
