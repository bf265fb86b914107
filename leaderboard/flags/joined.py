"""Whether what is joined belongs together: the records of a row by bytes and processor, the rows of a table by the code behind them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.record import Record

Found = Mapping[Stage, Record]
"""The records that a row shows."""
_MIXED = re.compile("(quality|speed) (measured on|of other bytes|is older than the artefact)|.*of other code than in the newest row")

_NAMED = 3
"""Instructions that a flag names; the others it counts."""


def artefact_of(record: Record) -> str | None:
    """The SHA-256 of the artefact that a record made or loaded; None where it does not say so."""
    if record.compress:
        return record.compress.artefact
    result = record.quality or record.speed
    return result.evidence.artefact if result and result.evidence else None


def strangers(found: Found, bearer: Record) -> list[str]:
    """Flags of a row whose records are of other bytes, or of another machine than the row is of.

    Args:
        bearer: The record whose hardware is that of the row.
    """
    compress = found.get(Stage.COMPRESS)
    elsewhere = [(record, machine) for record in found.values() if (machine := _other_machine(record, bearer))]
    measured = [record for stage, record in found.items() if stage is not Stage.COMPRESS]
    return [
        *(_elsewhere(record, machine, found) for record, machine in elsewhere),
        *(flag for record in measured if compress and (flag := _of_other_bytes(record, compress))),
    ]


def _other_machine(record: Record, bearer: Record) -> str | None:
    """The machine of a record where it is not the row's: by its label, or where processors of one name have other instructions."""
    here, there = bearer.hardware.label, record.hardware.label
    if not here or not there:
        return None
    if here != there:
        return there
    own, other = _instructions(bearer), _instructions(record)
    if not own or not other or own == other:
        return None
    differs = [f"{word} {_some(names)}" for word, names in (("with", other - own), ("without", own - other)) if names]
    return f"another {there} ({', '.join(differs)})"


def _some(names: frozenset[str]) -> str:
    first, more = sorted(names)[:_NAMED], len(names) - _NAMED
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


def _instructions(record: Record) -> frozenset[str]:
    """That its kernels could choose by; empty where it does not say, and where a card computes."""
    facts = record.provenance.get("hardware")
    flags = facts.get("cpu_flags") if isinstance(facts, dict) and record.cell.device != "cuda" else None
    return frozenset(map(str, flags)) if isinstance(flags, list) else frozenset()


def _elsewhere(record: Record, machine: str, found: Found) -> str:
    if record.stage is Stage.COMPRESS:
        return f"compressed on {machine}: the times of compression are of that"
    if record.quality and (loaded := artefact_of(record)) and all(artefact_of(other) == loaded for other in found.values()):
        return f"of the same bytes: quality from {machine}"
    return f"{'quality' if record.quality else 'speed'} measured on {machine}"


def _of_other_bytes(record: Record, compress: Record) -> str | None:
    result = record.quality or record.speed
    made = compress.compress.artefact if compress.compress else None
    if result is None or result.evidence is None or made is None:
        return None
    loaded = artefact_of(record)
    if loaded is None and record.started < compress.started:
        return f"{record.stage} is older than the artefact, and does not say of which bytes it is"
    if loaded is None or loaded == made:
        return None
    return f"{'quality' if record.quality else 'speed'} of other bytes than the compression ({loaded[:8]}, not {made[:8]})"


def other_code(table: Sequence[Found]) -> list[list[str]]:
    """Flags of the rows of one table: what of the code behind a row is not that of the newest row that has it, too.

    Records of older versions, which do not name their code, say nothing.

    Args:
        table: The records of each row.
    """
    newest: dict[str, tuple[str, str]] = {}
    for record in _all(table):
        for name, digest in record.code.items():
            newest[name] = max(newest.get(name, ("", "")), (record.started, digest))
    flags = []
    for found in table:
        stale: dict[str, set[str]] = defaultdict(set)
        for record in found.values():
            for name, digest in record.code.items():
                if digest != newest[name][1]:
                    stale[name].add(record.stage)
        flags.append(
            [
                f"{' and '.join(sorted(stages))}: {name} of other code than in the newest row of the table"
                for name, stages in sorted(stale.items())
            ]
        )
    return flags


def _all(table: Iterable[Found]) -> Iterable[Record]:
    return (record for found in table for record in found.values())


def mixed(flags: Iterable[str]) -> list[str]:
    """Those flags of a row that say that it joins what does not belong together; no table compares times of compression."""
    return [flag for flag in flags if _MIXED.match(flag)]
