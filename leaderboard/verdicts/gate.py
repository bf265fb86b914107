"""Does a compressed model keep so much of the dense one that it may ship? A pure function of the records.

One question about one cell, asked before its numbers were seen: so no correction for several, as the verdicts of a table have.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.schema.quality import QualityResult
from slimbench.harness.schema.record import Record
from slimbench.harness.stats.equivalence import items_to_decide
from slimbench.harness.stats.recovery import Recovery
from slimbench.leaderboard.compare.compare import compare
from slimbench.leaderboard.flags.kinds import Figure, invalidating
from slimbench.leaderboard.rows.index import Index, oldest_first
from slimbench.leaderboard.rows.pairing import paired_answers, paired_windows
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.tables.format import decimal

Metric = Literal["accuracy", "perplexity"]
_UNITS: dict[Metric, str] = {"accuracy": "items", "perplexity": "windows"}
_READS: dict[Metric, tuple[Figure, ...]] = {"accuracy": (Figure.QUALITY, Figure.ACCURACY), "perplexity": (Figure.QUALITY,)}
_LISTED = 8
_percent = decimal(1, 100)


class Answer(StrEnum):
    """What the data say of a recovery that is asked for."""

    SHOWN = "shown"
    BELOW = "below"
    UNDECIDED = "undecided"


class Gate(BaseModel):
    """The answer for one cell.

    Attributes:
        row: The compressed cell.
        reference: The dense one of the same engine, device and suite.
        asked: Recovery that is asked for, 1 where nothing may be lost.
        confidence: At which it must be shown.
        recovery: As it was measured: accuracy of the row / that of the reference, or perplexity of the reference / that of the row.
        low: The recovery is shown to be at least so much; `high`: at most so much; each at the confidence, None where it has no bound.
        count: Items, or windows, that both share.
        needed: How many would decide with 80 % power, if what was measured is the truth; None where it is decided, or where the recovery
            lies so near what is asked for that no number will do.
        flags: Flags of the two for which their quality counts for nothing, so that nothing is decided.
    """

    model_config = ConfigDict(frozen=True)

    row: Row
    reference: Row
    metric: Metric
    asked: float
    confidence: float
    answer: Answer
    recovery: float
    low: float | None
    high: float | None
    count: int
    needed: int | None
    flags: list[str]


def gate(
    records: Iterable[Record],
    name: str | None,
    asked: float,
    confidence: float = 0.95,
    metric: Metric = "accuracy",
    model: str | None = None,
    suite: str | None = None,
    device: str | None = None,
    include_flagged: bool = False,
) -> Gate:
    """Hold a cell against a recovery.

    Args:
        records: The records of a results folder.
        name: Label of a pipeline, or the beginning of a key, as of `compare`; None for the only compressed one among the records.
        asked: Recovery, above 0.
        confidence: Between 0.5 and 1.
        metric: What is recovered.
        model: Only cells of this model.
        suite: Only cells of this suite.
        device: Only cells on this kind of device.
        include_flagged: A quality counts although a flag takes it away.

    Raises:
        ConfigError: No cell has such a name, several have, it stands in no table with its reference, or the metric was not measured.
    """
    ordered = oldest_first(records)
    comparison = compare(ordered, name or _only(ordered, model, suite, device), None, model, suite, device)
    row, reference = comparison.a, comparison.b
    index = Index(ordered)
    recovery, count = _recovery(metric, row, _quality(index, row), _quality(index, reference))
    level = 1 - confidence
    above, below = recovery.above(asked), recovery.below(asked)
    flags = [] if include_flagged else invalidating([*row.flags, *reference.flags], _READS[metric])
    answer = Answer.UNDECIDED if flags else Answer.SHOWN if above <= level else Answer.BELOW if below <= level else Answer.UNDECIDED
    open_question = answer is Answer.UNDECIDED and not flags and not math.isnan(above)
    low, high = recovery.bounds(confidence)
    return Gate(
        row=row,
        reference=reference,
        metric=metric,
        asked=asked,
        confidence=confidence,
        answer=answer,
        recovery=recovery.value,
        low=low if low > 0 else None,
        high=high if math.isfinite(high) else None,
        count=count,
        needed=items_to_decide(*recovery.question(asked), level) if open_question else None,
        flags=flags,
    )


def describe(found: Gate) -> str:
    """The answer in one line, with its figures.

    `undecided: gptq keeps 88.6 % of dense in accuracy, at least 80.3 % and at most 96.8 %, each at 95 % confidence; 95 % are asked for;
    some 599 items would decide, 160 are there`
    """
    row, unit = found.row, _UNITS[found.metric]
    kept = f"{row.label} keeps {_percent(found.recovery)} % of {found.reference.label} in {found.metric}"
    sure, asked = f"{100 * found.confidence:g} % confidence", f"{100 * found.asked:g} % are asked for"
    low, high = (None if bound is None else f"{_percent(bound)} %" for bound in (found.low, found.high))
    if found.answer is Answer.SHOWN:
        return f"shown: {kept}, at least {low} at {sure}; {asked} ({found.count:,} {unit})"
    if found.answer is Answer.BELOW:
        return f"below: {kept}, at most {high} at {sure}; {asked} ({found.count:,} {unit})"
    if found.flags:
        return f"undecided: {kept}, which counts for nothing (`--include-flagged` counts it): {'; '.join(found.flags)}"
    bounds = [f"at least {low}" if low else "", f"at most {high}" if high else ""]
    shown = f", {' and '.join(filter(None, bounds))}, each at {sure}" if any(bounds) else ""
    tell = f"some {found.needed:,} {unit} would decide" if found.needed else f"no number of {unit} would decide, so near it lies"
    if found.count < 2:
        tell = f"more {unit} would decide"
    return f"undecided: {kept}{shown}; {asked}; {tell}, {found.count:,} are there"


def _only(records: Sequence[Record], model: str | None, suite: str | None, device: str | None) -> str:
    """The only compressed pipeline among the records."""
    cells = [record.cell for record in records if not record.foreign and record.cell.keys.compress != record.cell.reference.compress]
    wanted = {"model": model, "suite": suite, "device": device}
    kept = [cell for cell in cells if all(value in (None, getattr(cell, field)) for field, value in wanted.items())]
    names = sorted({cell.pipeline for cell in kept})
    if len(names) == 1:
        return names[0]
    if not names:
        raise ConfigError("no compressed cell among the records")
    shown = ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
    raise ConfigError(f"which of {len(names)} compressed cells? Name one: {shown}")


def _quality(index: Index, row: Row) -> QualityResult:
    if (quality := index.quality_of(row)) is None:
        raise ConfigError(f"{row.label} has no quality to judge: {row.reason or row.status}")
    return quality


def _recovery(metric: Metric, row: Row, ours: QualityResult, theirs: QualityResult) -> tuple[Recovery, int]:
    """The recovery, and the number of items behind it."""
    if metric == "perplexity":
        windows = paired_windows(ours, theirs)
        if windows is None:
            raise ConfigError(f"{row.label} shares no text with its reference in suite {row.suite}; --metric accuracy asks for tasks")
        return Recovery.of_perplexity(*windows), len(windows[0])
    answers = paired_answers(ours, theirs)
    if answers is None:
        raise ConfigError(f"{row.label} shares no tasks with its reference in suite {row.suite}; --metric perplexity asks for texts")
    try:
        return Recovery.of_accuracy(*answers), sum(map(len, answers[0]))
    except ValueError as error:
        raise ConfigError(f"{row.label} has no accuracy to judge: {error}") from error
