"""Records as a board needs them: without the log-likelihoods of zero-shot items, and with equal items of all records as one object.

Ten thousand records hold millions of items, most of them equal; so they fit in memory and are read several times faster.
"""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from harness.record import Record, ZeroshotItem, migrate
from harness.store import read

_IDENTITY = itemgetter("id", "hash", "correct")


class Reader:
    """Reads one file after the other. The items of its records are shared, so they are only to be read."""

    def __init__(self) -> None:
        self._items: dict[tuple[Any, Any, Any], ZeroshotItem] = {}

    def __call__(self, path: Path) -> Record | str:
        """The record in a file, or one line that says why there is none."""
        try:
            data = from_json(path.read_bytes())
            tasks = (data.get("quality") or {}).get("zeroshot") or []
            items = [self._shared(task["items"]) for task in tasks]
            for task in tasks:
                task["items"] = []
            record = Record.model_validate(migrate(data))
        except (OSError, ValueError, TypeError, LookupError, AttributeError):
            return read(path)
        if record.quality:
            for result, shared in zip(record.quality.zeroshot, items, strict=True):
                result.items = shared
        return record

    def _shared(self, raw: list[dict[str, Any]]) -> list[ZeroshotItem]:
        try:
            return list(map(self._items.__getitem__, map(_IDENTITY, raw)))
        except KeyError:
            return [self._one(item) for item in raw]

    def _one(self, raw: dict[str, Any]) -> ZeroshotItem:
        key = _IDENTITY(raw)
        if key not in self._items:
            self._items[key] = ZeroshotItem.model_validate(raw | {"loglikelihoods": []})
        return self._items[key]
