"""Which method is fastest at a batch and a context, and where along either one stops being faster than another.

Speed-ups, of decoding and of the prompt, are over dense on the same engine and machine, with 95 % intervals. Between measured points the
logarithm of a ratio of two speed-ups is taken as straight over the logarithm of batch or context. A crossover is where it is 0, its
interval where the bounds of the ratio are 0: two speed-ups are taken as independent, so that half-widths of their logarithms add in
squares.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from slimbench.harness.schema.ledger import Phase
from slimbench.leaderboard.flags.kinds import Figure, invalidating
from slimbench.leaderboard.rows.row import Row

DENSE = "dense"
SPEEDUP: dict[Phase, str] = {"decode": "speedup", "prefill": "prefill_speedup"}
_FIGURE = {"decode": Figure.DECODE, "prefill": Figure.PREFILL}
Axis = Literal["batch", "context"]


@dataclass(frozen=True)
class Gain:
    """A speed-up with the bounds of its interval."""

    value: float
    low: float
    high: float

    def over(self, other: Gain) -> Gain:
        """The ratio of two that are independent."""
        ratio = math.log(self.value / other.value)
        below = math.hypot(math.log(self.value / self.low), math.log(other.high / other.value))
        above = math.hypot(math.log(self.high / self.value), math.log(other.value / other.low))
        return Gain(math.exp(ratio), math.exp(ratio - below), math.exp(ratio + above))


@dataclass(frozen=True)
class Best:
    """The fastest method at a point of the grid.

    Attributes:
        gain: Over dense; 1 where dense is.
        next: The one behind it.
        lead: Its gain over that one.
        beside: Those from which it is not told apart: the interval of its gain over them holds 1.
    """

    batch: int
    context: int
    label: str
    gain: Gain
    next: str | None
    lead: Gain | None
    beside: Sequence[str] = ()

    @property
    def is_clear(self) -> bool:
        """Whether it is told apart from all others."""
        return not self.beside


@dataclass(frozen=True)
class Crossing:
    """Where a method stops being faster than another one, or begins to be.

    Attributes:
        first: Faster before it.
        then: Faster behind it.
        over: Along which axis.
        fixed: The value of the other one.
        at: Place on the axis.
        low: Lower bound of its 95 % interval; None: below all that was measured.
        high: Upper bound; None: above all that was measured.
    """

    first: str
    then: str
    over: Axis
    fixed: int
    at: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Field:
    """The rows of one model, engine, machine and protocol of speed, point by point.

    Attributes:
        row: One of them, for what they have in common.
        phase: Whose speed-ups.
        gains: By (batch, context) and label.
        rows: By label.
    """

    row: Row
    phase: Phase
    gains: Mapping[tuple[int, int], Mapping[str, Gain]]
    rows: Mapping[str, Row] = field(default_factory=dict)

    @property
    def of_one_process(self) -> bool:
        """Whether intervals of a row do not hold what differs from process to process."""
        return any(flag.startswith("speed of one process") for row in self.rows.values() for flag in row.flags)

    def best(self) -> list[Best]:
        """At every point, in order."""
        return [_best(point, known) for point, known in sorted(self.gains.items())]

    def crossings(self) -> list[Crossing]:
        """Along both axes, of each two methods, dense among them."""
        labels = sorted({label for known in self.gains.values() for label in known} - {DENSE})
        pairs = [*((label, DENSE) for label in labels), *itertools.combinations(labels, 2)]
        return [found for over in ("batch", "context") for one, other in pairs for line in self._lines(over, one, other) for found in line]

    def _lines(self, over: Axis, one: str, other: str) -> Iterator[list[Crossing]]:
        axis = 0 if over == "batch" else 1
        lines: dict[int, list[tuple[int, Gain]]] = defaultdict(list)
        for point, known in sorted(self.gains.items()):
            if one in known and other in known:
                lines[point[1 - axis]].append((point[axis], known[one].over(known[other])))
        for fixed, line in sorted(lines.items()):
            yield [_named(place, one, other, over, fixed) for place in places(line) if place.is_shown]


@dataclass(frozen=True)
class Deployment:
    """A use, and what is fastest for it.

    Attributes:
        name: In a word or two.
        best: At the point of the grid that stands for it.
    """

    name: str
    best: Best


def deployments(of: Field) -> list[Deployment]:
    """One stream and many behind the shortest context, one behind the longest; those that the grid tells apart."""
    batches, contexts = ({point[axis] for point in of.gains} for axis in (0, 1))
    few, many, short, long = min(batches), max(batches), min(contexts), max(contexts)
    points = [
        ("one stream", (few, short), True),
        ("many streams", (many, short), many > few),
        ("a long context", (few, long), long > short),
    ]
    return [Deployment(name, _best(point, of.gains[point])) for name, point, is_told in points if is_told and point in of.gains]


def fields(board: Sequence[Row]) -> list[Field]:
    """Those with several points and a method beside dense, of decoding and of the prompt; no row whose figure is flagged as invalid.

    Of two rows of one label, such as those of two versions of an engine, the newer one counts.
    """
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in sorted(board, key=lambda row: str(row.provenance.get("measured", ""))):
        if row.speed_points and not row.foreign:
            place = row.device, row.hardware, row.fingerprint
            groups[row.model, row.engine_label, *place, row.speed, row.speed_protocol, row.temperature].append(row)
    found = []
    for group in groups.values():
        for phase, name in SPEEDUP.items():
            valid = {row.label: row for row in group if counts(row, phase)}
            found.append(Field(group[0], phase, _gains(list(valid.values()), name), valid))
    return [each for each in found if len(each.gains) > 1]


def counts(row: Row, phase: Phase) -> bool:
    """Whether a speed-up of a row may be compared: it is one's own, and no flag takes it away."""
    return not row.foreign and not invalidating(row.flags, [_FIGURE[phase]])


def _gains(group: Sequence[Row], name: str) -> dict[tuple[int, int], dict[str, Gain]]:
    found: dict[tuple[int, int], dict[str, Gain]] = {}
    for row in group:
        for point in row.speed_points:
            batch, context, value = (point.get(each) for each in ("batch", "prompt", name))
            low, high = (point.get(f"{name}_{bound}") for bound in ("low", "high"))
            if row.is_reference or not (isinstance(batch, int) and isinstance(context, int) and isinstance(value, float)):
                continue
            bounds = [bound for bound in (low, high) if isinstance(bound, float) and 0 < bound < math.inf]
            if value > 0 and len(bounds) == 2:
                known = found.setdefault((batch, context), {DENSE: Gain(1.0, 1.0, 1.0)})
                known[row.label] = Gain(value, *bounds)
    return found


def _best(point: tuple[int, int], known: Mapping[str, Gain]) -> Best:
    (label, gain), *others = sorted(known.items(), key=lambda item: -item[1].value)
    behind = others[0] if others else None
    beside = [other for other, theirs in others if gain.over(theirs).low <= 1]
    return Best(*point, label, gain, behind[0] if behind else None, gain.over(behind[1]) if behind else None, beside)


@dataclass(frozen=True)
class Place:
    """Where a ratio crosses 1, with the bounds of its interval; None: beyond what was measured. `falls`: above 1 before it."""

    at: float
    low: float | None
    high: float | None
    falls: bool

    @property
    def is_shown(self) -> bool:
        """Whether the ratio is told apart from 1 on one side at least."""
        return self.low is not None or self.high is not None


def places(line: Sequence[tuple[int, Gain]]) -> list[Place]:
    """Where a ratio crosses 1; of several places with one interval the last, behind which it stays on its side."""
    values, lows, highs = ([(at, getattr(gain, name)) for at, gain in line] for name in ("value", "low", "high"))
    found: dict[Any, Place] = {}
    for at, falls in _zeros(values):
        early, late = (lows, highs) if falls else (highs, lows)
        before = [zero for zero, down in _zeros(early) if down is falls and zero <= at]
        behind = [zero for zero, down in _zeros(late) if down is falls and zero >= at]
        place = Place(at, max(before, default=None), min(behind, default=None), falls)
        found[place.low, place.high, falls] = place
    return sorted(found.values(), key=lambda place: place.at)


def _zeros(line: Sequence[tuple[int, float]]) -> Iterator[tuple[float, bool]]:
    """Places, and whether the ratio falls there."""
    for (a, here), (b, there) in itertools.pairwise(line):
        if (here > 1) != (there > 1):
            share = math.log(here) / (math.log(here) - math.log(there))
            yield math.exp(math.log(a) + share * (math.log(b) - math.log(a))), here > 1


def _named(place: Place, one: str, other: str, over: Axis, fixed: int) -> Crossing:
    first, then = (one, other) if place.falls else (other, one)
    return Crossing(first, then, over, fixed, place.at, place.low, place.high)
