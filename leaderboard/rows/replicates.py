"""Rows of one pipeline: what tells them apart, and how far their result depends on the seeds."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import stdev
from typing import Any

from slimbench.harness.schema.record import Record
from slimbench.leaderboard.rows.groups import Calibration
from slimbench.leaderboard.rows.row import Row


def calibration(record: Record) -> Calibration:
    """The calibration text of a row; nothing where the pipeline uses none."""
    settings = record.config.get("calibration")
    if record.cell.calibration is None or not isinstance(settings, dict):
        return Calibration()
    text = f"{settings.get('source')}, {settings.get('samples')} × {settings.get('length')} tokens"
    return Calibration(calibration_text=text, calibration_seed=settings.get("seed"))


def families(board: Iterable[tuple[Row, Record]]) -> list[str]:
    """For each row a text that rows share which differ in nothing but their seeds.

    Quality counts: rows of several machines and speed protocols may share one result, and then have one name.

    Args:
        board: Rows, each with a record of its cell.
    """
    definitions: dict[str, str] = {}
    return [definitions.setdefault(row.keys.quality, _but_for_seeds(row, record)) for row, record in board]


def spread(board: Sequence[Row], families: Sequence[str]) -> list[Row]:
    """The rows with the spread of their perplexity over seeds, and with what tells those of one pipeline apart."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row, family in zip(board, families, strict=True):
        groups[family].append(row)
    named = [row for group in groups.values() for row in _with_spread(group)]
    named = _told_apart(named, lambda row: row.calibration_text)
    return _told_apart(named, lambda row: f"key {row.keys.quality[:8]}")


def _but_for_seeds(row: Row, record: Record) -> str:
    """Everything that defines the quality of a row except its seeds; as in keys, a setting that is None is off or was not there yet."""
    pipeline, model = (_without_nulls(part) for part in (record.config.get("pipeline") or record.cell.steps, record.config.get("model")))
    steps = [{field: value for field, value in step.items() if field not in ("name", "grid")} for step in pipeline]
    words = [row.foreign, row.quality_key, row.pipeline, row.engine_label, row.calibration_text, steps, model]
    return json.dumps(words, sort_keys=True, default=str)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _with_spread(group: Sequence[Row]) -> list[Row]:
    if len({row.keys.quality for row in group}) == 1:
        return list(group)
    varying = [
        (name, field)
        for name, field in (("seed", "seed"), ("calibration seed", "calibration_seed"))
        if len({getattr(row, field) for row in group}) > 1
    ]
    known = list({row.keys.quality: row.perplexity for row in group if row.perplexity is not None}.values())
    facts: dict[str, Any] = {"replicates": len(known)}
    if len(known) > 1:
        facts |= {"perplexity_seed_sd": stdev(known), "perplexity_seed_min": min(known), "perplexity_seed_max": max(known)}
    return [
        row.model_copy(update=facts | {"replicate": " · ".join(f"{name} {getattr(row, field)}" for name, field in varying) or None})
        for row in group
    ]


def _told_apart(board: Iterable[Row], tell: Callable[[Row], str | None]) -> list[Row]:
    """The rows; those that have one name and differ in `tell` with that before their seeds."""
    groups: dict[tuple[bool | str, ...], list[Row]] = defaultdict(list)
    for row in board:
        groups[row.foreign, *row.quality_key, row.label, row.engine_label].append(row)
    return [
        row.model_copy(update={"replicate": " · ".join(filter(None, (tell(row), row.replicate)))}) if len(told) > 1 else row
        for group in groups.values()
        for told in [{tell(row) for row in group}]
        for row in group
    ]
