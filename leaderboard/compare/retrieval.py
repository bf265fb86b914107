"""What is left of long contexts under a policy, beside the bytes that are held of them and the time of a step behind them."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from slimbench.harness.schema.record import Record
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.tables.format import EMPTY, decimal, shorten
from slimbench.leaderboard.tables.tables import suite_of

READING = (
    "Score: of the facts that dense finds, the share that the row finds, in per cent, with a 95 % interval over contexts; what dense does "
    "not find is left out. MB: what is held of a context before a question is known. ms: a step of decoding behind it, not taken in turns "
    "with dense's, so that it also differs by what else the machine did; the stage `speed` takes turns."
)
SHARES = (0.5, 0.9)
"""Of what dense finds: scores at which methods are told apart by what they hold."""
LEAST = (
    "At an equal score: of the settings of a method that find at least so much of what dense finds, the one that holds the least, and its "
    "time of a step. By the scores as they are, whose intervals stand above; no line where no setting finds as much."
)
_LONGEST = 100
_SETTINGS = re.compile(r"\([^()]*\)")


def figures(records: Iterable[Record]) -> list[dict[str, Any]]:
    """A line of numbers for each row and length, what is not known is None: by model, engine and machine, the shortest contexts first,
    what holds the least of them first.
    """
    found = [(row, context) for row in rows(records) for context in row.contexts]
    return [_figures(row, context) for row, context in sorted(found, key=lambda pair: _place(*pair))]


def _place(row: Row, context: dict[str, Any]) -> tuple[Any, ...]:
    held = math.inf if context["cache_bytes"] is None else context["cache_bytes"]
    return row.model, row.suite, row.engine_label, row.hardware, row.suite_changes or "", context["length"], held, row.label


def _figures(row: Row, context: dict[str, Any]) -> dict[str, Any]:
    names = {"model": row.model, "engine": row.engine_label, "hardware": row.hardware, "suite": suite_of(row), "method": row.label}
    names["family"] = _SETTINGS.sub("", row.label)
    reason = context["reason"]
    return {
        **{name: shorten(value, _LONGEST) for name, value in names.items()},
        **context,
        "reason": shorten(reason, 3 * _LONGEST) if reason else None,
    }


def tables(found: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """The same to be read: under a title for each model, engine, machine, suite and length."""
    return {title: [_words(line) for line in lines] for title, lines in _titled(found).items()}


def at_equal_scores(found: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """Under the same titles, for each method what it holds at each of `SHARES`; the least at the lowest of them first."""
    return {title: made for title, lines in _titled(found).items() if (made := _equal(lines))}


def _equal(lines: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    least: dict[str, list[dict[str, Any] | None]] = {}
    for family in dict.fromkeys(line["family"] for line in lines):
        own = [line for line in lines if line["family"] == family and None not in (line["score"], line["cache_bytes"])]
        reaching = ([line for line in own if line["score"] >= share] for share in SHARES)
        least[family] = [min(enough, key=_held_and_taken, default=None) for enough in reaching]
    reached = {family: found for family, found in least.items() if any(found)}
    return [
        {"method": family} | {key: said for share, line in zip(SHARES, found, strict=True) for key, said in _held(share, line).items()}
        for family, found in sorted(reached.items(), key=lambda item: [line["cache_bytes"] if line else math.inf for line in item[1]])
    ]


def _held_and_taken(line: dict[str, Any]) -> tuple[float, float]:
    return line["cache_bytes"], math.inf if line["step_ms"] is None else line["step_ms"]


def _held(share: float, line: dict[str, Any] | None) -> dict[str, str]:
    of, words = decimal(0, 100)(share), _words(line) if line else {}
    return {f"{of} %: MB": words.get("MB", EMPTY), f"{of} %: ms": words.get("ms", EMPTY), f"{of} %: by": words.get("method", EMPTY)}


def _titled(found: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The lines of each model, engine, machine, suite and length."""
    made: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in found:
        counted = "" if line["dense_answers"] is None else f"dense finds {line['dense_answers']} of {line['items']} facts"
        parts = (line["model"], f"{line['length']:,} tokens", counted, line["suite"], line["engine"], line["hardware"])
        made[" · ".join(part for part in parts if part)].append(line)
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
