"""The fastest method at each batch and context, and crossovers, as tables."""

from __future__ import annotations

from collections.abc import Sequence

from slimbench.harness.schema.ledger import Phase
from slimbench.leaderboard.compare.crossover import DENSE, Best, Crossing, Deployment, Field, Gain
from slimbench.leaderboard.rows.clean import clean
from slimbench.leaderboard.tables.format import EMPTY, decimal

READING = (
    "Gains are times as fast as dense on the same engine, with 95 % intervals; those of one process do not hold what differs from process "
    "to process. A lead is not clear where an interval of it holds 1. Between measured points a crossover is interpolated; an open bound "
    "lies beyond them, and a crossover with two of them is left out."
)
PHASES: dict[Phase, str] = {"decode": "decoding", "prefill": "the prompt"}
_NUMBER, _PLACE = decimal(2), decimal(1)


def title(field: Field) -> str:
    """What the rows have in common."""
    runs = " · of one process" if field.of_one_process else ""
    return f"{field.row.model} · {field.row.engine_label} · {field.row.hardware} · {PHASES[field.phase]}{runs}"


def best(found: Sequence[Best]) -> list[dict[str, str]]:
    """A line for each point."""
    return [
        {
            "batch": str(one.batch),
            "context": str(one.context),
            "fastest": one.label,
            "gain": _span(one.gain),
            "next": one.next or EMPTY,
            "lead": _span(one.lead) if one.lead else EMPTY,
            "not told apart from": ", ".join(one.beside) or EMPTY,
        }
        for one in found
    ]


def use(one: Deployment) -> tuple[str, str]:
    """What is fastest for a use: what stands before its name in a sentence, and behind it."""
    best = one.best
    where = f"{one.name.capitalize()} (batch {best.batch}, {best.context:,} tokens): "
    apart = f", not told apart from {', '.join(map(clean, best.beside))}" if best.beside else ""
    if best.label == DENSE:
        return f"{where}nothing is faster than ", f"{apart}."
    gain = f", {_NUMBER(best.gain.value)} × as fast as dense ({_NUMBER(best.gain.low)} to {_NUMBER(best.gain.high)})"
    return where, f"{gain}{apart}."


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
