"""What was measured of a setting that a ledger foretells: the same step of another cell that differs in nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from slimbench.harness.schema.ledger import Ledger, Phase
from slimbench.harness.schema.record import Record

_ROUNDS = "rtn"
"""The method whose settings are those of a ledger, and nothing else."""
_OF_DENSE = {"head_bits": None, "symmetric": True, "clip": None}
"""Settings of a grid that is put in the place of dense weights."""


def gains(record: Record, ledger: Ledger, peers: Iterable[Record]) -> dict[str, float]:
    """Times as many steps a second by setting, as in `Forecast.setting`; each beside its own reference, since machines drift.

    Args:
        record: Speed of a cell.
        ledger: Of its ledgers the one whose forecasts are looked for.
        peers: Speed of cells on the same hardware.
    """
    here, mine = _settings(record), _slowness(record, ledger.phase)
    groups = {f"bits={other.value}": other.group_size for other in ledger.alternatives if other.setting == "bits"}
    found: dict[str, float] = {}
    for other in peers:
        theirs = _slowness(other, ledger.phase)
        if mine and theirs and _surroundings(other) == _surroundings(record) and (setting := _changed(here, _settings(other), groups)):
            found[setting] = mine / theirs
    return found


def _settings(record: Record) -> Mapping[str, Any] | None:
    """Of a cell that rounds weights, or none at all where it is dense; None for others."""
    steps = record.cell.steps
    if record.cell.keys.compress == record.cell.reference.compress:
        return {}
    held = steps[0].get("settings") if len(steps) == 1 and steps[0].get("method") == _ROUNDS else None
    return held if isinstance(held, dict) else None


def _changed(here: Mapping[str, Any] | None, there: Mapping[str, Any] | None, groups: Mapping[str, int | None]) -> str | None:
    """The one setting in which another cell differs, as it has it; of dense also the group that is foretold with its bits."""
    if here is None or there is None:
        return None
    if not there:
        return "bits=null" if here and here.get("head_bits") is None else None
    if not here:
        bits, is_plain = f"bits={there.get('bits')}", all(there.get(name) == value for name, value in _OF_DENSE.items())
        return bits if is_plain and bits in groups and there.get("group_size") == groups[bits] else None
    differing = [name for name in {*here, *there} if here.get(name) != there.get(name)]
    if len(differing) != 1:
        return None
    value = there.get(differing[0])
    return f"{differing[0]}={'null' if value is None else value}"


def _surroundings(record: Record) -> tuple[Any, ...]:
    config, cell = record.config, record.cell
    engine, speed = (config.get(name) for name in ("engine", "speed"))
    grid = speed.get("grid") if isinstance(speed, dict) else None
    return cell.model, cell.dtype, cell.device, engine, grid[:1] if isinstance(grid, list) else None


def _slowness(record: Record, phase: Phase) -> float | None:
    """A step over that of the reference in the same turns; None where it has no ledger of both."""
    speed = record.speed
    if speed is None:
        return None
    if record.cell.keys.compress == record.cell.reference.compress:
        return 1.0 if _of(speed.ledgers, phase) else None
    step, reference = _of(speed.ledgers, phase), _of(speed.reference_ledgers, phase)
    return step.step_ms / reference.step_ms if step and reference else None


def _of(ledgers: Iterable[Ledger], phase: Phase) -> Ledger | None:
    return next((ledger for ledger in ledgers if ledger.phase == phase), None)
