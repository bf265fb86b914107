"""What is wrong with the records of a folder: files that are none, records in the wrong place, figures that their own samples refute."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

from slimbench.harness.schema.evidence import Evidence
from slimbench.harness.schema.identity import Status
from slimbench.harness.schema.quality import QualityResult
from slimbench.harness.schema.record import NAMED_KEYS, Record
from slimbench.harness.schema.speed import SpeedResult
from slimbench.harness.store import leftovers
from slimbench.harness.store.store import Store, read
from slimbench.methods.base import Claim
from slimbench.util.locks import OWNER, TAKEN
from slimbench.util.text import one_line

_ROUNDING = 1e-6
_SLACK = 0.98
"""Share of the claimed bits that the files of an artefact must hold at least."""


@dataclass(frozen=True)
class Fault:
    """What a file breaks. `path` is relative to the results folder; both are one line."""

    path: str
    what: str


def check(store: Store) -> tuple[int, list[Fault]]:
    """Number of files that should be records, and what they break."""
    records: dict[str, Record] = {}
    faults: list[Fault] = []
    for path in store.files():
        name, record = path.relative_to(store.root).as_posix(), read(path)
        if isinstance(record, str):
            faults.append(Fault(name, " ".join(record.split())))
        else:
            records[name] = record
    claims = {r.cell.keys.compress: (r.compress.claim, r.compress.disk_bytes) for r in records.values() if r.compress}
    for name, record in records.items():
        place = store.path(record.cell, record.stage, record.hardware).relative_to(store.root).as_posix()
        if record.schema_version < NAMED_KEYS:
            faults.append(
                Fault(name, f"of schema {record.schema_version}, with keys of import paths; `slimbench records migrate` renews it")
            )
        elif name != place:
            faults.append(Fault(name, f"belongs at {place}"))
        claim, disk_bytes = claims.get(record.cell.keys.compress, (None, None))
        faults += [Fault(name, what) for what in _faults(record, claim, disk_bytes)]
    return len(records) + sum(fault.path not in records for fault in faults), sorted(faults, key=lambda fault: fault.path)


def remarks(store: Store) -> list[Fault]:
    """What is no fault of a record and ought to be known: records of other folders, and what ended processes left here and in the cache."""
    foreign = (store.path(r.cell, r.stage, r.hardware).relative_to(store.root) for r in store.scan()[0] if r.foreign)
    found = [Fault(path.as_posix(), "of another results folder; `slimbench records adopt` takes it for one's own") for path in foreign]
    for path in leftovers.of_results(store.root):
        kind = "a lock whose owner is gone" if path.suffix in (OWNER, TAKEN) else "left by a process that has ended"
        found.append(Fault(path.relative_to(store.root).as_posix(), f"{kind}; the next run removes it"))
    cached = {path: "left in the cache by what has ended; the next run removes it" for path in leftovers.of_cache()}
    return found + [Fault(one_line(str(path)), what) for path, what in sorted(cached.items())]


def _faults(record: Record, claim: Claim | None, disk_bytes: int | None) -> Iterator[str]:
    """What a record breaks.

    Args:
        claim: What the method claimed of the artefact; None if its record is not there. So `disk_bytes`, the bytes of its files.
    """
    if record.key != record.cell.keys.of(record.stage):
        yield f"key {record.key}, but its cell says {record.cell.keys.of(record.stage)}"
    result = getattr(record, record.stage.value)
    if record.status is Status.OK and result is None:
        yield f"ok, but without a result of {record.stage.value}"
    if record.status is not Status.OK and record.failure is None:
        yield f"{record.status.value}, but without a failure"
    if record.compress and record.compress.files and (total := sum(f.bytes for f in record.compress.files)) != record.compress.disk_bytes:
        yield f"disk_bytes {record.compress.disk_bytes}, but its files have {total}"
    evidence = getattr(result, "evidence", None)
    if evidence is not None:
        yield from _storage_faults(evidence, claim, disk_bytes)
    if record.quality:
        yield from _quality_faults(record.quality)
    if record.speed:
        yield from _speed_faults(record.speed, imported=record.imported is not None)


def _storage_faults(evidence: Evidence, claim: Claim | None, disk_bytes: int | None) -> Iterator[str]:
    for layer in evidence.layers:
        if layer.parameters and not math.isclose(layer.bits_per_weight, 8 * layer.bytes / layer.parameters, rel_tol=_ROUNDING):
            yield f"{layer.bits_per_weight:g} bits a weight of {layer.layer}, but {layer.bytes} bytes for {layer.parameters} weights"
    weights, bits = sum(layer.parameters for layer in evidence.layers if layer.role == "linear"), claim.bits if claim else None
    if claim and bits is not None and disk_bytes is not None and not claim.simulated and disk_bytes < _SLACK * weights * bits / 8:
        yield f"claims {bits:g} bits for {weights} weights, but its files have only {disk_bytes} bytes"


def _quality_faults(quality: QualityResult) -> Iterator[str]:
    for text in quality.perplexity:
        if text.window_nll and not math.isclose(text.perplexity, _exp(fmean(text.scored)), rel_tol=_ROUNDING):
            yield f"perplexity {text.perplexity:g} of {text.corpus}, but its windows give {_exp(fmean(text.scored)):g}"
    for task in quality.zeroshot:
        if task.items and not math.isclose(task.accuracy, fmean(task.items.correct), rel_tol=_ROUNDING, abs_tol=_ROUNDING):
            yield f"accuracy {task.accuracy:g} of {task.task}, but its items give {fmean(task.items.correct):g}"


def _speed_faults(speed: SpeedResult, imported: bool) -> Iterator[str]:
    for point in speed.points:
        if point.reference and len(point.reference.decode_ms) != len(point.candidate.decode_ms):
            yield f"{len(point.candidate.decode_ms)} runs, but {len(point.reference.decode_ms)} of the reference beside them"
        if point.roofline and (point.roofline.fraction or 0) > 1:
            yield f"{point.roofline.fraction:.0%} of what the {point.roofline.bandwidth} bandwidth allows"
    if speed.points and not imported and not (speed.evidence and speed.evidence.kernel):
        yield "a speed without the kernel that ran"


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
