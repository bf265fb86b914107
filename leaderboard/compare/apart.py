"""Why two cells stand in no common table: the facts in which they differ, with both values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slimbench.harness.schema.identity import Stage
from slimbench.leaderboard.rows.index import Index
from slimbench.leaderboard.rows.row import Row

_MOST = 3


def apart(firsts: Sequence[Row], seconds: Sequence[Row], index: Index) -> str:
    """`suite.windows 16 against 4`: what tells the two nearest cells of two names apart.

    Args:
        firsts: The cells of one name; not empty.
        seconds: Those of the other, none of them in a table with one of `firsts`.
        index: The records by stage, key and hardware: they hold what the protocols of the cells are.
    """
    differences = [_differences(a, b, index) for a in firsts for b in seconds]
    found = min(differences, key=len)
    more = f" and {len(found) - _MOST} more" if len(found) > _MOST else ""
    return ", ".join(found[:_MOST]) + more


def _differences(a: Row, b: Row, index: Index) -> list[str]:
    found = [
        f"{name} {getattr(a, name)} against {getattr(b, name)}"
        for name in ("model", "suite", "device", "hardware", "speed")
        if getattr(a, name) != getattr(b, name)
    ]
    if a.hardware == b.hardware and a.fingerprint != b.fingerprint:
        found.append(f"two machines that are both called {a.hardware}, fingerprint {a.fingerprint} against {b.fingerprint}")
    if a.suite == b.suite and a.suite_protocol != b.suite_protocol:
        found += _settings("suite", a, b, Stage.QUALITY, index) or ["the texts and tasks of their suite"]
    if a.speed == b.speed and a.speed_protocol != b.speed_protocol:
        found += _settings("speed", a, b, Stage.SPEED, index) or ["the protocol of their speed"]
    return found


def _settings(name: str, a: Row, b: Row, stage: Stage, index: Index) -> list[str]:
    """The settings of a section of the configuration that differ, as `suite.windows 16 against 4`."""
    ours, theirs = (_section(row, name, stage, index) for row in (a, b))
    return [
        f"{name}.{key} {_short(ours.get(key))} against {_short(theirs.get(key))}"
        for key in sorted({*ours, *theirs})
        if ours.get(key) != theirs.get(key) and key not in ("name", "batch_tokens")
    ]


def _section(row: Row, name: str, stage: Stage, index: Index) -> Mapping[str, Any]:
    for known in (stage, *Stage):
        record = index.of_row(row, known)
        if record and isinstance(section := record.config.get(name), dict):
            return section
    return {}


def _short(value: Any) -> str:
    text = f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
