"""Verdicts of the rows of each table against their reference, what would resolve them, and which adjacent rows differ."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from slimbench.harness.schema.quality import QualityResult
from slimbench.harness.stats import equivalence, significance
from slimbench.harness.stats.bootstrap import attempt
from slimbench.harness.stats.equivalence import ACCURACY_MARGIN, PERPLEXITY_MARGIN, Verdict
from slimbench.harness.stats.losses import AnswerLoss, Loss, MeanLoss
from slimbench.harness.stats.significance import LEVEL
from slimbench.leaderboard.flags.kinds import Figure, spoiling
from slimbench.leaderboard.rows.clean import clean
from slimbench.leaderboard.rows.pairing import paired_answers, paired_windows
from slimbench.leaderboard.rows.row import Row


class Paired(NamedTuple):
    """A row with its quality and that of its reference; None where it was not measured to the end, or where it is the reference."""

    row: Row
    quality: QualityResult | None
    reference: QualityResult | None


@dataclass(frozen=True)
class Measure:
    """A figure of quality that has a margin.

    Attributes:
        name: Beginning of the row's fields.
        figures: What an invalidating flag takes away of a row that has no verdict for it.
        margin: In the unit of the loss.
        rank: Field of the rank: rows that have one share their items.
        merit: By which the rows of a table are adjacent; more is better.
        pair: What two results share; None where that is nothing.
        loss: Of such a pair.
        p_value: Of the difference of such a pair.
        facts: Number of shared items and the difference that they can show, as fields of a row.
    """

    name: str
    figures: tuple[Figure, ...]
    margin: float
    rank: str
    merit: Callable[[Row], float]
    pair: Callable[[QualityResult, QualityResult], tuple[Any, Any] | None]
    loss: Callable[[Any, Any], Loss]
    p_value: Callable[[Any, Any], float]
    facts: Callable[[Loss], dict[str, Any]]


def _of_windows(loss: Loss) -> dict[str, Any]:
    detectable = equivalence.detectable(float(loss.error), loss.count)
    return {"perplexity_windows": loss.count, "perplexity_detectable_percent": 100 * math.expm1(detectable)}


def _of_items(loss: Loss) -> dict[str, Any]:
    return {"accuracy_items": loss.count, "accuracy_detectable": equivalence.detectable(float(loss.error), math.inf)}


MEASURES = (
    Measure(
        "perplexity",
        (Figure.QUALITY,),
        PERPLEXITY_MARGIN,
        "rank",
        lambda row: -(row.perplexity or math.inf),
        paired_windows,
        MeanLoss.of,
        significance.paired_p_value,
        _of_windows,
    ),
    Measure(
        "accuracy",
        (Figure.QUALITY, Figure.ACCURACY),
        ACCURACY_MARGIN,
        "accuracy_rank",
        lambda row: row.accuracy or 0.0,
        paired_answers,
        AnswerLoss.of,
        significance.accuracy_p_value,
        _of_items,
    ),
)


def judged(board: Sequence[Paired]) -> list[Row]:
    """The rows with their verdicts, and whether each differs from the next better one, within its table.

    A foreign row beside one's own has neither, as it has no rank.

    Args:
        board: Rows that have their ranks.
    """
    tables: dict[tuple[str, ...], list[int]] = defaultdict(list)
    own = {paired.row.table_key for paired in board if not paired.row.foreign}
    for place, (row, quality, _) in enumerate(board):
        if quality and not (row.foreign and row.table_key in own):
            tables[row.table_key].append(place)
    found: dict[int, dict[str, Any]] = defaultdict(dict)
    for places in tables.values():
        table = {place: board[place] for place in places}
        for measure in MEASURES:
            for place, facts in itertools.chain(_verdicts(measure, table), _apart(measure, table)):
                found[place] |= facts
    return [paired.row.model_copy(update=clean(found[place])) if place in found else paired.row for place, paired in enumerate(board)]


def _verdicts(measure: Measure, table: dict[int, Paired]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The verdict of each row of a table that shares something with its reference, and what would resolve it."""
    sound = {place: results for place, (row, *results) in table.items() if not any(spoiling(row.flags, f) for f in measure.figures)}
    losses = {place: loss for place, results in sound.items() if (loss := _loss(measure, *results))}
    judgements = equivalence.judge([equivalence.p_values(loss, measure.margin) for loss in losses.values()])
    unresolved = sum(verdict is Verdict.UNRESOLVED and not math.isnan(p) for verdict, p in judgements)
    for (place, loss), (verdict, p) in zip(losses.items(), judgements, strict=True):
        is_open = verdict is Verdict.UNRESOLVED and not math.isnan(p)
        needed = equivalence.items_to_resolve(loss, measure.margin, LEVEL / unresolved) if is_open else None
        needed = None if needed is None else max(needed, loss.count + 1)  # the power knows no skewness, the test does
        facts = {"verdict": verdict.value, "verdict_p": p, "needed": needed}
        yield place, {f"{measure.name}_{name}": value for name, value in facts.items()} | measure.facts(loss)


def _loss(measure: Measure, ours: QualityResult | None, theirs: QualityResult | None) -> Loss | None:
    pair = measure.pair(ours, theirs) if ours and theirs else None
    return attempt(measure.loss, *pair, otherwise=None) if pair else None


def _apart(measure: Measure, table: dict[int, Paired]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Whether each ranked row differs significantly from the next better one; Holm's correction over the pairs."""
    ranked = [place for place, (row, *_) in table.items() if getattr(row, measure.rank) is not None]
    ranked.sort(key=lambda place: measure.merit(table[place].row), reverse=True)
    pairs = [measure.pair(table[better].quality, table[worse].quality) for better, worse in itertools.pairwise(ranked)]  # type: ignore[arg-type]
    p_values = significance.holm([measure.p_value(*pair) if pair else math.nan for pair in pairs])
    for place, p in zip(ranked[1:], p_values, strict=True):
        yield place, {f"{measure.name}_apart": bool(p < LEVEL)}
