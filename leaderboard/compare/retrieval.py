"""What is left of long contexts under a policy, beside the bytes that are held of them and the time of a step behind them.

A row is held against dense of the same model on the same engine and machine, item by item. What dense does not answer says nothing of a
policy and is left out; where dense answers too few items, a length has no score.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.record import Record
from slimbench.harness.schema.retrieval import RetrievalResult
from slimbench.harness.stats.bootstrap import UNDEFINED, Estimate, attempt
from slimbench.harness.stats.shares import clustered_share
from slimbench.leaderboard.flags.kinds import Figure, spoiling
from slimbench.leaderboard.rows.clean import clean
from slimbench.leaderboard.rows.index import Index, oldest_first
from slimbench.leaderboard.rows.pairing import facts_of, partners
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.tables.format import EMPTY, decimal, shorten

FEWEST = 8
"""Items that dense must answer for a score."""
READING = (
    "Score: of the facts that dense finds, the share that the row finds, in per cent, with a 95 % interval over contexts; what dense does "
    "not find is left out. MB: what is held of a context before a question is known. ms: a step of decoding behind it, not taken in turns "
    "with dense's, so that it also differs by what else the machine did; the stage `speed` takes turns."
)
_LONGEST = 60
_OF_OTHER_TEXTS = "policy never exercised"
"""Where windows are short, contexts need not be."""


@dataclass(frozen=True)
class Line:
    """A row at one length.

    Attributes:
        ours: Its result.
        dense: That of dense on the same items; None where there is none.
        answered: Items that dense answers; None without it.
        score: Of these, the share that the row answers, of dense itself all without an interval; None where `reason` says why not.
    """

    row: Row
    ours: RetrievalResult
    dense: RetrievalResult | None
    answered: int | None
    score: Estimate | None
    reason: str = ""


def lines(records: Iterable[Record]) -> list[Line]:
    """Every row at every length: by model, engine and machine, the shortest contexts first, what holds the least of them first."""
    ordered = oldest_first(records)
    index = Index(ordered)
    found: list[Line] = []
    for row in rows(ordered):
        record, quality = index.of_row(row, Stage.QUALITY), index.quality_of(row)
        if record is None or quality is None:
            continue
        reference = index.reference(record)
        theirs = reference.quality if reference and reference.quality else None
        spoiled = next((flag for flag in spoiling(row.flags, Figure.QUALITY) if not flag.startswith(_OF_OTHER_TEXTS)), None)
        for ours, dense in partners(quality.retrieval, theirs.retrieval if theirs else [], facts_of):
            found.append(_line(row, ours, dense, spoiled))
    return sorted(found, key=_place)


def _place(line: Line) -> tuple[Any, ...]:
    row, held = line.row, line.ours.cache_bytes
    return row.model, row.suite, row.engine_label, row.hardware, line.ours.length, math.inf if held is None else held, row.label


def _line(row: Row, ours: RetrievalResult, dense: RetrievalResult | None, spoiled: str | None) -> Line:
    if dense is None:
        return Line(row, ours, None, None, None, "dense was not asked the same on this engine and machine")
    answered = sum(dense.correct)
    if answered < FEWEST:
        return Line(row, ours, dense, answered, None, f"dense finds {answered} of {len(dense.correct)} facts, fewer than {FEWEST}")
    if spoiled:
        return Line(row, ours, dense, answered, None, spoiled)
    if ours.exact_keys == 1:
        return Line(row, ours, dense, answered, None, f"{_OF_OTHER_TEXTS}: contexts are no longer than what stays exact")
    return Line(row, ours, dense, answered, Estimate(1.0, *UNDEFINED) if ours is dense else score(ours, dense))


def score(ours: RetrievalResult, dense: RetrievalResult) -> Estimate:
    """Of the items that dense answers the share that we answer; bounds are `nan` where all of them are of one context.

    Args:
        dense: The same items (`facts_of`), of which it answers some.
    """
    clusters: dict[int, list[int]] = defaultdict(list)
    for number, right, known in zip(ours.context, ours.correct, dense.correct, strict=True):
        if known:
            clusters[number].append(right)
    found, asked = [sum(items) for items in clusters.values()], [len(items) for items in clusters.values()]
    return attempt(clustered_share, found, asked, otherwise=Estimate(sum(found) / sum(asked), *UNDEFINED))


def figures(found: Sequence[Line]) -> list[dict[str, Any]]:
    """A line of numbers for each; what is not known is None."""
    return [_figures(line) for line in found]


def _figures(line: Line) -> dict[str, Any]:
    row, ours, dense = line.row, line.ours, line.dense
    value, low, high = line.score or (None, None, None)
    names = {"model": row.model, "engine": row.engine_label, "hardware": row.hardware, "suite": row.suite, "method": row.label}
    return {
        **{name: shorten(str(clean(value)), _LONGEST) for name, value in names.items()},
        "length": ours.length,
        "items": len(ours.correct),
        "answered": sum(ours.correct),
        "dense_answers": line.answered,
        "left_out": None if line.answered is None else len(ours.correct) - line.answered,
        "score": value,
        "score_low": low if low is not None and math.isfinite(low) else None,
        "score_high": high if high is not None and math.isfinite(high) else None,
        "cache_bytes": ours.cache_bytes,
        "dense_cache_bytes": dense.cache_bytes if dense else None,
        "step_ms": statistics.median(ours.step_ms) if ours.step_ms else None,
        "dense_step_ms": statistics.median(dense.step_ms) if dense and dense.step_ms else None,
        "reason": shorten(str(clean(line.reason)), 3 * _LONGEST) or None,
    }


def tables(found: Sequence[Line]) -> dict[str, list[dict[str, str]]]:
    """The same to be read: under a title for each model, engine, machine, suite and length."""
    made: dict[str, list[dict[str, str]]] = defaultdict(list)
    for line in figures(found):
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
