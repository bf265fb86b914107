"""What is left of long contexts under a policy, beside the bytes that are held of them and the time of a step behind them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from slimbench.harness.schema.record import Record
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.tables.format import EMPTY, decimal, shorten

READING = (
    "Score: of the facts that dense finds, the share that the row finds, in per cent, with a 95 % interval over contexts; what dense does "
    "not find is left out. MB: what is held of a context before a question is known. ms: a step of decoding behind it, not taken in turns "
    "with dense's, so that it also differs by what else the machine did; the stage `speed` takes turns."
)
_LONGEST = 60


def figures(records: Iterable[Record]) -> list[dict[str, Any]]:
    """A line of numbers for each row and length, what is not known is None: by model, engine and machine, the shortest contexts first,
    what holds the least of them first.
    """
    found = [(row, context) for row in rows(records) for context in row.contexts]
    return [_figures(row, context) for row, context in sorted(found, key=lambda pair: _place(*pair))]


def _place(row: Row, context: dict[str, Any]) -> tuple[Any, ...]:
    held = math.inf if context["cache_bytes"] is None else context["cache_bytes"]
    return row.model, row.suite, row.engine_label, row.hardware, context["length"], held, row.label


def _figures(row: Row, context: dict[str, Any]) -> dict[str, Any]:
    names = {"model": row.model, "engine": row.engine_label, "hardware": row.hardware, "suite": row.suite, "method": row.label}
    reason = context["reason"]
    return {
        **{name: shorten(value, _LONGEST) for name, value in names.items()},
        **context,
        "reason": shorten(reason, 3 * _LONGEST) if reason else None,
    }


def tables(found: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """The same to be read: under a title for each model, engine, machine, suite and length."""
    made: dict[str, list[dict[str, str]]] = defaultdict(list)
    for line in found:
        counted = "" if line["dense_answers"] is None else f"dense finds {line['dense_answers']} of {line['items']} facts"
        parts = (line["model"], f"{line['length']:,} tokens", counted, line["suite"], line["engine"], line["hardware"])
        made[" · ".join(part for part in parts if part)].append(_words(line))
    return dict(made)


def _words(line: dict[str, Any]) -> dict[str, str]:
    percent, number = decimal(0, 100), decimal(1)
    bounds = line["score_low"], line["score_high"]
    said = percent(line["score"]) if line["score"] is not None else EMPTY
    return {
        "method": line["method"],
        "score": said,
        "95 % interval": EMPTY if None in bounds else " to ".join(map(percent, bounds)),
        "MB": EMPTY if line["cache_bytes"] is None else decimal(2, 1e-6)(line["cache_bytes"]),
        "MB of dense": EMPTY if line["dense_cache_bytes"] is None else decimal(2, 1e-6)(line["dense_cache_bytes"]),
        "ms": EMPTY if line["step_ms"] is None else number(line["step_ms"]),
        "ms of dense": EMPTY if line["dense_step_ms"] is None else number(line["dense_step_ms"]),
        "": line["reason"] or "",
    }
