"""What can stand on an axis, and rows as points between two axes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from slimbench.harness.schema.identity import Status
from slimbench.leaderboard.flags.kinds import competes
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import INCOMPLETE
from slimbench.leaderboard.tables.tables import quality_field


@dataclass(frozen=True)
class Measure:
    """A number of a row as an axis shows it.

    Attributes:
        key: Field of the row.
        label: Of the axis.
        missing: How a caption calls a row without it: `without …`.
        scale: Factor from the row to the axis.
        bounds: Fields of the 95 % interval.
        rising: Whether more is better.
        name: Beginning of file names.
    """

    key: str
    label: str
    missing: str
    name: str
    scale: float = 1.0
    bounds: tuple[str, str] | None = None
    rising: bool = False

    def value(self, row: Row) -> float | None:
        value = getattr(row, self.key)
        return None if value is None else float(value * self.scale)

    def interval(self, row: Row) -> tuple[float, float]:
        """The 95 % interval, which holds the value; a side that is unknown is the value itself."""
        value = self.value(row) or 0.0
        low, high = (getattr(row, bound) for bound in self.bounds) if self.bounds else (None, None)
        return (
            value if low is None else min(value, low * self.scale),
            value if high is None else max(value, high * self.scale),
        )


PERPLEXITY = Measure(
    "perplexity", "perplexity  (↓ lower is better)", "perplexity", "perplexity", bounds=("perplexity_low", "perplexity_high")
)
ACCURACY = Measure(
    "accuracy",
    "mean zero-shot accuracy, %  (↑ higher is better)",
    "accuracy",
    "accuracy",
    100,
    bounds=("accuracy_low", "accuracy_high"),
    rising=True,
)
DELTA = Measure(
    "perplexity_delta_percent",
    "perplexity above dense, %  (↓ lower is better)",
    "difference to a reference",
    "degradation",
    bounds=("perplexity_delta_low", "perplexity_delta_high"),
)
LOSS = Measure(
    "loss_percent",
    "perplexity above dense, %  (↓ lower is better)",
    "perplexity above dense",
    "perplexity",
    bounds=("perplexity_delta_low", "perplexity_delta_high"),
)
"""`DELTA`, and 0 of the reference itself."""
KL = Measure("kl_mean", "KL(dense ‖ row) per token, nats  (← lower is better)", "KL", "kl", bounds=("kl_low", "kl_high"))
BYTES = Measure("weight_bytes", "weights in memory, MB  (← smaller is better)", "size", "bytes", 1e-6)
BITS = Measure("effective_bits", "bits stored for each compressed weight  (← fewer is better)", "bits", "bits")
SPEED = Measure(
    "decode_tokens_per_s",
    "decode, tokens / s  (faster is better →)",
    "speed",
    "speed",
    bounds=("decode_low", "decode_high"),
    rising=True,
)
SPARSITY = Measure("sparsity", "zeros among the weights of the linear layers, %", "sparsity", "sparsity", 100)
REMOVED = Measure("removed", "parameters removed of all of the model's, %", "parameters", "removed", 100)
ACTIVE = Measure(
    "scored_active_share", "parameters that take part in a scored token, %  (← fewer is better)", "counted work", "active", 100
)
"""Of the tokens whose perplexity stands on the other axis."""
HELD = Measure("held_cache_bytes", "cache held for a text, MB  (← smaller is better)", "counted work", "cache", 1e-6)
TOKENS = Measure("training_tokens", "tokens of training", "training", "recovery")


def quality(rows: Sequence[Row]) -> Measure:
    """How the quality of these rows is shown: paired with the reference where any row is, else by the perplexity alone."""
    return LOSS if quality_field(rows) == LOSS.key else PERPLEXITY


@dataclass(frozen=True)
class Point:
    """A row between two axes, with its intervals; a side without an interval is the value itself."""

    row: Row
    x: float
    y: float
    low: float
    high: float
    left: float
    right: float


def points(rows: Iterable[Row], x: Measure, y: Measure, limit: float = float("inf")) -> list[Point]:
    """The rows that have both numbers and a `y` within the limit."""
    found = []
    for row in rows:
        across, up = x.value(row), y.value(row)
        if across is not None and up is not None and up <= limit:
            low, high = y.interval(row)
            left, right = x.interval(row)
            found.append(Point(row, across, up, low, high, left, right))
    return found


def front(shown: Sequence[Point], x: Measure, y: Measure) -> list[Point]:
    """The points that no other beats on both axes at once, best `y` first.

    Only rows that ended well take part, and whose figures no flag takes away.
    """
    across, up = (-1 if measure.rising else 1 for measure in (x, y))
    members: list[Point] = []
    best = float("inf")
    for point in sorted(shown, key=lambda p: (up * p.y, across * p.x)):
        is_valid = point.row.status in (Status.OK, INCOMPLETE) and competes(point.row.flags, x.key, y.key)
        if is_valid and across * point.x < best:
            members.append(point)
            best = across * point.x
    return members
