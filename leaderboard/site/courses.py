"""How the losses of a training went, as charts on the page of its cell."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slimbench.harness.schema.record import Record
from slimbench.leaderboard.rows.clean import clean
from slimbench.leaderboard.tables.format import shorten

WIDTH, HEIGHT = 720, 240
LEFT, RIGHT, TOP, BOTTOM = 62, WIDTH - 12, 8, HEIGHT - 34
_MOST_POINTS, _MOST_PARTS, _MOST_LESSONS, _LONGEST = 200, 6, 6, 40
_LOGARITHMIC = 20.0  # from this quotient of the largest and the smallest loss on

_Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """A loss or a part of it: a path of SVG, and the last value for the legend."""

    name: str
    path: str
    last: str


@dataclass(frozen=True)
class Chart:
    """The losses of one training over its steps; ticks are (place, text)."""

    title: str
    curves: Sequence[Curve]
    across: Sequence[tuple[float, str]]
    up: Sequence[tuple[float, str]]


def charts(record: Record | None) -> list[Chart]:
    """One for each lesson of a training of which the record holds the losses."""
    details = record.compress.claim.details if record and record.compress else {}
    training = details.get("training")
    if not isinstance(training, Mapping):
        return []
    earlier = training.get("earlier_lessons")
    lessons = [*(earlier[:_MOST_LESSONS] if isinstance(earlier, list) else []), training]
    drawn = [_curves(lesson) for lesson in lessons if isinstance(lesson, Mapping)]
    drawn = [curves for curves in drawn if curves]
    titles = ["Training"] if len(drawn) == 1 else [f"Training, part {number} of {len(drawn)}" for number in range(1, len(drawn) + 1)]
    return [_chart(title, curves) for title, curves in zip(titles, drawn, strict=True)]


def _curves(lesson: Mapping[str, Any]) -> dict[str, _Points]:
    """The loss, and its parts where it has several; nothing where no two steps are known."""
    parts = lesson.get("loss_terms")
    named = list(parts.items())[:_MOST_PARTS] if isinstance(parts, Mapping) and len(parts) > 1 else []
    whole = {"loss": _points(lesson.get("loss_curve"))}
    found = {shorten(str(clean(name)), _LONGEST): _points(points) for name, points in named} | whole
    return whole | {name: points for name, points in found.items() if points} if whole["loss"] else {}


def _points(course: Any) -> _Points:
    """(step, value) in the order of the steps; nothing of a course that is none, or has fewer than two."""
    if not isinstance(course, list) or len(course) > _MOST_POINTS:
        return []
    pairs = [point for point in course if isinstance(point, list) and len(point) == 2 and all(map(_number, point))]
    return sorted((float(step), float(value)) for step, value in pairs) if len(pairs) == len(course) > 1 else []


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12


def _chart(title: str, curves: Mapping[str, _Points]) -> Chart:
    steps, values = ([point[axis] for points in curves.values() for point in points] for axis in (0, 1))
    logarithmic = min(values) > 0 and max(values) / min(values) > _LOGARITHMIC
    across, up = _Axis(min(steps), max(steps), LEFT, RIGHT), _Axis(min(values), max(values), BOTTOM, TOP, logarithmic)
    drawn = [Curve(name, _path(points, across, up), f"{points[-1][1]:.3g}") for name, points in curves.items()]
    return Chart(title, drawn, list(across.ticks()), list(up.ticks()))


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    begin: float
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        low, high, at = ((math.log(x) if self.logarithmic else x) for x in (self.low, self.high, value))
        return round(self.begin + (self.end - self.begin) * ((at - low) / (high - low) if high > low else 0.5), 1)

    def ticks(self) -> Iterator[tuple[float, str]]:
        from matplotlib.ticker import LogLocator, MaxNLocator

        wide = self.high / self.low > 1000 if self.logarithmic else False
        locator = LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)) if self.logarithmic else MaxNLocator(5)
        for value in locator.tick_values(self.low, self.high):
            if self.low <= value <= self.high:
                yield self.place(float(value)), f"{value:,.10g}" if abs(value) >= 1 or not value else f"{value:.3g}"


def _path(points: _Points, across: _Axis, up: _Axis) -> str:
    return "M" + "L".join(f"{across.place(step)} {up.place(value)}" for step, value in points)
