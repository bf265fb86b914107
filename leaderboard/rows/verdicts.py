"""Verdicts of the rows of each table against their reference, what would resolve the open ones, and what each row can show at all."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from slimbench.harness.schema.quality import QualityResult
from slimbench.harness.stats import equivalence
from slimbench.harness.stats.bootstrap import attempt
from slimbench.harness.stats.equivalence import ACCURACY_MARGIN, PERPLEXITY_MARGIN, Verdict
from slimbench.harness.stats.losses import AnswerLoss, Loss, MeanLoss
from slimbench.harness.stats.significance import LEVEL
from slimbench.leaderboard.rows.clean import clean
from slimbench.leaderboard.rows.pairing import paired_answers, paired_windows
from slimbench.leaderboard.rows.row import Row

Paired = tuple[Row, QualityResult | None, QualityResult | None]
"""A row, its quality where that was measured to the end, and that of its reference."""


@dataclass(frozen=True)
class Measure:
    """A quantity with a margin.

    Attributes:
        name: Beginning of the row's fields.
        count: Field of the number of items.
        detectable: Field of the difference that can be found.
        loss: Of a row against its reference; None where they share nothing.
        detected: The difference that can be found, in the unit of its field.
    """

    name: str
    margin: float
    count: str
    detectable: str
    loss: Callable[[QualityResult, QualityResult], Loss | None]
    detected: Callable[[Loss], float]


def _of_windows(ours: QualityResult, theirs: QualityResult) -> Loss | None:
    pair = paired_windows(ours, theirs)
    return attempt(MeanLoss.of, *pair, otherwise=None) if pair else None


def _of_answers(ours: QualityResult, theirs: QualityResult) -> Loss | None:
    pair = paired_answers(ours, theirs)
    return attempt(AnswerLoss.of, *pair, otherwise=None) if pair else None


MEASURES = (
    Measure(
        "perplexity",
        PERPLEXITY_MARGIN,
        "perplexity_windows",
        "perplexity_detectable_percent",
        _of_windows,
        lambda loss: 100 * math.expm1(equivalence.detectable(float(loss.error), loss.count)),
    ),
    Measure(
        "accuracy",
        ACCURACY_MARGIN,
        "accuracy_items",
        "accuracy_detectable",
        _of_answers,
        lambda loss: equivalence.detectable(float(loss.error), math.inf),
    ),
)


def judged(board: Sequence[Paired]) -> list[Row]:
    """The rows with their verdicts, each within its table. A foreign row beside one's own has none, as it has no rank."""
    tables: dict[tuple[str, ...], list[int]] = defaultdict(list)
    own = {row.table_key for row, _, _ in board if not row.foreign}
    for place, (row, ours, theirs) in enumerate(board):
        if ours and theirs and not row.is_reference and not (row.foreign and row.table_key in own):
            tables[row.table_key].append(place)
    facts: dict[int, dict[str, Any]] = defaultdict(dict)
    for places in tables.values():
        for measure in MEASURES:
            for place, found in _facts(measure, {place: board[place][1:] for place in places}):
                facts[place] |= found
    return [row.model_copy(update=clean(facts[place])) if place in facts else row for place, (row, _, _) in enumerate(board)]


def _facts(measure: Measure, table: dict[int, Any]) -> list[tuple[int, dict[str, Any]]]:
    """The fields of each row of a table that has a loss."""
    losses = {place: loss for place, pair in table.items() if (loss := measure.loss(*pair))}
    judgements = equivalence.judge([equivalence.p_values(loss, measure.margin) for loss in losses.values()])
    unresolved = sum(found.verdict is Verdict.UNRESOLVED and not math.isnan(found.p) for found in judgements)
    return [
        (
            place,
            {
                f"{measure.name}_verdict": found.verdict.value,
                f"{measure.name}_verdict_p": found.p,
                f"{measure.name}_needed": _needed(loss, measure.margin, LEVEL / unresolved)
                if found.verdict is Verdict.UNRESOLVED and unresolved
                else None,
                measure.count: loss.count,
                measure.detectable: measure.detected(loss),
            },
        )
        for (place, loss), found in zip(losses.items(), judgements, strict=True)
    ]


def _needed(loss: Loss, margin: float, level: float) -> int | None:
    return None if math.isnan(loss.error) else equivalence.items_to_resolve(loss, margin, level)
