"""Whether two steps of a pipeline hurt each other: the loss of both against the losses of each alone, on the same windows.

With the mean NLL of a row on the windows of a text, in nats, and Δ its difference to that of the reference,

    interaction = Δ(both) − Δ(first alone) − Δ(second alone)

As a ratio of perplexities it is 1 where losses multiply as if the steps knew nothing of each other, above 1 where the second step finds
a model that bears it less, and below 1 where it bears it better. The interval is over windows, of the interaction of each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.record import Record
from slimbench.harness.stats.bootstrap import Estimate
from slimbench.harness.stats.crossed import crossed_mean
from slimbench.leaderboard.compare.grids import ratio
from slimbench.leaderboard.rows.index import Index, oldest_first
from slimbench.leaderboard.rows.pairing import paired_windows
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows


@dataclass(frozen=True)
class Joint:
    """A pipeline of several steps beside each of its steps alone; ratios of perplexities, with 95 % intervals.

    Attributes:
        row: Of the pipeline.
        alone: Of each step, in their order.
        losses: Of each step alone over the reference.
        loss: Of the pipeline over the reference.
        interaction: Of the pipeline over the product of the losses of its steps.
    """

    row: Row
    alone: tuple[Row, ...]
    losses: tuple[Estimate, ...]
    loss: Estimate
    interaction: Estimate

    @property
    def expected(self) -> float:
        """Perplexity over the reference, if the steps knew nothing of each other."""
        return self.loss.value / self.interaction.value

    @property
    def verdict(self) -> str:
        """What the interval of the interaction says."""
        if self.interaction.low > 1:
            return "worse than the steps alone say"
        return "better than the steps alone say" if self.interaction.high < 1 else "not told apart"


def joints(records: Iterable[Record]) -> list[Joint]:
    """All pipelines whose steps were measured alone too, on the same model, texts and engine; the largest interaction first."""
    ordered = oldest_first(records)
    index = Index(ordered)
    return joints_of(rows(ordered), index)


def joints_of(board: Iterable[Row], index: Index) -> list[Joint]:
    """The same of the rows of a board, whose records the index holds."""
    known: dict[tuple[Any, ...], Row] = {}
    whole: list[tuple[Row, tuple[str, ...]]] = []
    for row in board:
        names = _steps(row, index)
        if row.perplexity is None or row.foreign or names is None:
            continue
        known.setdefault((_setting(row), () if row.is_reference else names, row.calibration), row)
        if len(names) > 1:
            whole.append((row, names))
    found = [joint for row, names in whole for joint in _joint(row, names, known, index)]
    return sorted(found, key=lambda joint: (-joint.interaction.value, joint.row.label))


def _joint(row: Row, names: tuple[str, ...], known: Mapping[tuple[Any, ...], Row], index: Index) -> Iterator[Joint]:
    dense = known.get((_setting(row), (), None))
    texts = (row.calibration, None)  # a step alone had the pipeline's text, or takes none
    found = [next((part for text in texts if (part := known.get((_setting(row), (name,), text)))), None) for name in names]
    alone = tuple(part for part in found if part)
    reference = index.quality_of(dense) if dense else None
    if reference is None or len(alone) < len(names):
        return
    changes: list[NDArray[np.float64]] = []
    for each in (row, *alone):
        quality = index.quality_of(each)
        pair = paired_windows(quality, reference) if quality else None
        if pair is None:
            return
        changes.append(np.asarray(pair[0]) - np.asarray(pair[1]))
    whole, *parts = changes
    losses = tuple(ratio(crossed_mean(part[None])) for part in parts)
    yield Joint(row, alone, losses, ratio(crossed_mean(whole[None])), ratio(crossed_mean((whole - sum(parts))[None])))


def _setting(row: Row) -> tuple[Any, ...]:
    return row.quality_key, row.engine_label, row.seed, row.dtype


def _steps(row: Row, index: Index) -> tuple[str, ...] | None:
    """What tells the steps of a row: the method of each and its settings."""
    record = index.of_row(row, Stage.QUALITY)
    if record is None:
        return None
    return tuple(json.dumps([step.get("method"), step.get("settings")], sort_keys=True) for step in record.cell.steps)
