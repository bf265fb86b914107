"""The flags of a row, from the records of its stages."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from slimbench.harness.schema.evidence import Evidence, simulation
from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.quality import QualityResult
from slimbench.harness.schema.record import Record
from slimbench.leaderboard.flags import facts
from slimbench.leaderboard.flags.declared import declared
from slimbench.leaderboard.flags.joined import strangers
from slimbench.leaderboard.flags.kinds import shown

_GGUF_GRID, _GGUF_GROUP = re.compile(r"q(\d)_[01]"), 32
_GRID_MET = 5.0
"""Per cent of perplexity: a grid that lies otherwise than the source's loses several times as much in a small model."""
_AS_LOADED, _STORES = re.compile(r"\S+ bits as loaded, ([\d.]+) from the first call on"), re.compile(r"claims \S+ bits, stores ([\d.]+)")
_ROUNDED = 0.06
"""Bits by which two texts may differ that round the same number to one and to two digits."""
_SIMULATED = "simulated: "


def flags(
    bearer: Record,
    found: Mapping[Stage, Record],
    rival: Record | None,
    theirs: QualityResult | None,
    loss: float | None,
    losses: list[str],
) -> list[str]:
    """One line for each thing that a reader must know about a row.

    Args:
        bearer: A record with the row's cell.
        found: Its records.
        rival: The speed record of its reference; None for the reference itself.
        theirs: The quality of its reference; None for the reference itself.
        loss: Perplexity above the reference in per cent.
        losses: What is flagged of its tasks.
    """
    compress, quality, speed = (found.get(stage) for stage in Stage)
    measured = speed or quality or bearer
    evidence = [e for e in (quality and quality.quality and quality.quality.evidence, speed and speed.speed and speed.speed.evidence) if e]
    lines = ["foreign: recorded in another results folder; `slimbench records adopt` takes it for one's own"] if bearer.foreign else []
    if imported := measured.imported:
        lines.append(f"imported from {imported.label} ({imported.file}): measured by that tool, without evidence")
    lines += _of_evidence(evidence)
    lines += speed.speed.flags if speed and speed.speed else []
    lines += facts.of_speed(speed, rival) if speed and not (compress and compress.simulated) else []
    lines += [*quality.quality.flags, *facts.of_quality(quality.quality)] if quality and quality.quality else []
    counted = (quality and quality.quality and quality.quality.work, speed and speed.speed and speed.speed.work)
    lines += [line for work in counted if work for line in work.flags]
    lines += facts.never_exercised(quality.quality, theirs, compress) if quality and quality.quality else []
    lines += losses
    lines += compress.compress.flags if compress and compress.compress else []
    lines += declared(bearer) if quality and quality.quality else []
    lines += _grid_of_the_source(bearer.cell.source_precision, compress, loss)
    lines += [_cut_off(record) for record in found.values() if record.attempts]
    if compress and compress.compress and compress.simulated:
        lines.append(f"{simulation(compress.compress.claim, evidence[0] if evidence else None)}; no speed figure")
    return shown([*lines, *strangers(found, measured)])


def _of_evidence(evidence: list[Evidence]) -> list[str]:
    """The flags of all evidence, one for a fact: what was seen before and after the first call explains what was seen after it alone.

    That something is simulated is told from the claim, since records of earlier versions call packed weights dense.
    """
    lines = [flag for found in evidence for flag in found.flags if not flag.startswith(_SIMULATED)]
    seen = [float(found[1]) for flag in lines if (found := _AS_LOADED.fullmatch(flag))]
    accused = {flag: float(found[1]) for flag in lines if (found := _STORES.fullmatch(flag))}
    return [flag for flag in lines if not any(abs(bits - accused.get(flag, math.inf)) < _ROUNDED for bits in seen)]


def _cut_off(record: Record) -> str:
    """A flag of a stage that took more than one attempt: its seconds on the clock are those of all."""
    times, reasons = len(record.attempts), ", ".join(dict.fromkeys(attempt.reason.value for attempt in record.attempts))
    return (
        f"{record.stage.value} was cut off {f'{times} times' if times > 1 else 'once'} before ({reasons}): its record adds up the seconds"
    )


def _grid_of_the_source(precision: str | None, compress: Record | None, loss: float | None) -> list[str]:
    """A flag where a source that was itself rounded is rounded to as many bits in as small groups, and next to nothing is lost."""
    source = _GGUF_GRID.fullmatch(precision or "")
    claim = compress.compress.claim if compress and compress.compress else None
    if not source or claim is None or loss is None or loss > _GRID_MET or (claim.bits, claim.group_size) != (int(source[1]), _GGUF_GROUP):
        return []
    grid = f"{source[1]} bits in groups of {_GGUF_GROUP}"
    return [f"the source was made from {precision}, {grid} as here: a grid that is met again tells nothing of full precision"]
