"""Rows that differ in nothing but their seeds: how far the result of a pipeline depends on chance."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import stdev
from typing import Any

from harness.record import Record
from leaderboard.row import Row


def calibration(record: Record) -> dict[str, Any]:
    """The calibration fields of a `Row`; nothing where the pipeline uses no calibration text."""
    settings = record.config.get("calibration")
    if record.cell.calibration is None or not isinstance(settings, dict):
        return {}
    text = f"{settings.get('source')}, {settings.get('samples')} × {settings.get('length')} tokens"
    return {"calibration_text": text, "calibration_seed": settings.get("seed")}


def spread(board: Iterable[tuple[Row, Record]]) -> list[Row]:
    """The rows with the spread of their perplexity over seeds, where there are several.

    Args:
        board: Rows, each with a record of its cell.
    """
    groups: dict[str, list[Row]] = defaultdict(list)
    for row, record in board:
        groups[_but_for_seeds(row, record)].append(row)
    return [row for group in groups.values() for row in _with_spread(group)]


def _but_for_seeds(row: Row, record: Record) -> str:
    """Everything that defines a row except its seeds."""
    pipeline = record.config.get("pipeline") or record.cell.steps
    words = [row.table_key, row.pipeline, row.engine_label, row.calibration_text, pipeline, record.config.get("model")]
    return json.dumps(words, sort_keys=True, default=str)


def _with_spread(group: Sequence[Row]) -> list[Row]:
    if len(group) == 1:
        return list(group)
    varying = [
        (name, field)
        for name, field in (("seed", "seed"), ("calibration seed", "calibration_seed"))
        if len({getattr(row, field) for row in group}) > 1
    ]
    known = [row.perplexity for row in group if row.perplexity is not None]
    facts: dict[str, Any] = {"replicates": len(known)}
    if len(known) > 1:
        facts |= {"perplexity_seed_sd": stdev(known), "perplexity_seed_min": min(known), "perplexity_seed_max": max(known)}
    return [
        row.model_copy(update=facts | {"replicate": " · ".join(f"{name} {getattr(row, field)}" for name, field in varying) or None})
        for row in group
    ]
