"""The fastest method at each batch and context, and crossovers, as tables."""

from __future__ import annotations

from collections.abc import Sequence

from slimbench.leaderboard.compare.crossover import Best, Crossing, Field, Gain
from slimbench.leaderboard.tables.format import EMPTY, decimal

READING = (
    "Gains are times as fast as dense on the same engine, with 95 % intervals; a lead whose interval holds 1 is not clear. Between "
    "measured points a crossover is interpolated; an open bound lies beyond them."
)
_NUMBER, _PLACE = decimal(2), decimal(1)


def title(field: Field) -> str:
    """What the rows have in common."""
    return f"{field.row.model} · {field.row.engine_label} · {field.row.hardware}"


def best(found: Sequence[Best]) -> list[dict[str, str]]:
    """A line for each point."""
    return [
        {
            "batch": str(one.batch),
            "context": str(one.context),
            "fastest": one.label,
            "gain": _span(one.gain),
            "next": one.next or EMPTY,
            "lead": f"{_span(one.lead)}{'' if one.is_clear else ', not clear'}" if one.lead else EMPTY,
        }
        for one in found
    ]


def crossings(found: Sequence[Crossing]) -> list[dict[str, str]]:
    """A line for each crossover."""
    return [
        {
            "faster before": one.first,
            "faster behind": one.then,
            "over": one.over,
            "fixed": f"{'context' if one.over == 'batch' else 'batch'} {one.fixed}",
            "crossover": _PLACE(one.at),
            "95 %": f"{_bound(one.low, 'below')} to {_bound(one.high, 'above')}",
        }
        for one in found
    ]


def _span(gain: Gain) -> str:
    return f"{_NUMBER(gain.value)} ({_NUMBER(gain.low)} to {_NUMBER(gain.high)})"


def _bound(value: float | None, beyond: str) -> str:
    return beyond if value is None else _PLACE(value)
