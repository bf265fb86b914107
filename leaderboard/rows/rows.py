"""Records become rows: one row for each cell, joined by content keys. A pure function; the order of records is without effect."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from statistics import fmean
from typing import Any

from slimbench.harness.schema.evidence import Evidence
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.quality import QualityResult
from slimbench.harness.schema.record import Record
from slimbench.leaderboard.flags import facts
from slimbench.leaderboard.flags.collect import flags
from slimbench.leaderboard.flags.joined import other_code
from slimbench.leaderboard.rows import changes, steps
from slimbench.leaderboard.rows.groups import Cache, Cost, Fidelity, Identity, Size, Speed
from slimbench.leaderboard.rows.index import Index, cells, oldest_first
from slimbench.leaderboard.rows.pairing import items_of, prompts_of
from slimbench.leaderboard.rows.ranks import Measured, ranked
from slimbench.leaderboard.rows.replicates import calibration, families, spread
from slimbench.leaderboard.rows.results import speed as speeds
from slimbench.leaderboard.rows.results.quality import accuracy, divergence, fidelity, losses, perplexity
from slimbench.leaderboard.rows.results.retrieval import retrieval
from slimbench.leaderboard.rows.results.work import Work, work
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.verdicts.judged import Paired, judged
from slimbench.util.hashing import short_hash
from slimbench.util.parallel import mapped

INCOMPLETE = "incomplete"
_WORST_FIRST = (Status.FAILED, Status.OOM, Status.TIMEOUT, Status.DIVERGED, Status.UNSUPPORTED)
_WORD = re.compile(r"(?:'[^']*'|\S)+")
_LIBRARIES = ("torch", "transformers", "lm_eval", "llmcompressor", "bitsandbytes", "compressed-tensors", "triton")


def rows(records: Iterable[Record]) -> list[Row]:
    """The board: one row for each combination of compress, quality and speed key that any record names, and hardware.

    Where several records have the same stage, key and hardware, the newest counts. Rows are sorted by table, then reference
    first, then perplexity; rows without a result come last.
    """
    ordered = oldest_first(records)
    index = Index(ordered)
    texts = {foreign: _texts([r for r in ordered if foreign or not r.foreign]) for foreign in (False, True)}
    bearers = list(cells(ordered).values())
    alone = list(mapped(lambda bearer: _row(bearer, index if bearer.foreign else index.own, texts[bearer.foreign]), bearers))
    made = _of_one_code(_with_dense_caches(alone, index), index)
    alike = families(zip(made, bearers, strict=True))
    artefacts = {row.place: facts.artefact(index.of_row(row, Stage.COMPRESS)) for row in made}
    board = ranked([Measured(row, index.quality_of(row), family, artefacts[row.place]) for row, family in zip(made, alike, strict=True)])
    board = judged([Paired(row, index.quality_of(row), _reference_quality(row, index)) for row in board])
    board = facts.copies(spread(board, alike), artefacts)
    scored = {row.place: facts.likelihoods(index.quality_of(row)) for row in made}
    return sorted(facts.same_answers(board, artefacts, scored), key=_order)


def _order(row: Row) -> tuple[Any, ...]:
    empty = row.perplexity is None and row.decode_tokens_per_s is None
    value = math.inf if row.perplexity is None else row.perplexity
    return (
        *row.table_key,
        row.foreign,
        empty,
        not row.is_reference,
        value,
        row.pipeline,
        row.engine,
        *row.keys.model_dump().values(),
        row.fingerprint,
    )


def _of_one_code(board: Sequence[Row], index: Index) -> list[Row]:
    """The rows, with a flag where the code behind one is not that of the newest row of its table."""
    tables: dict[tuple[str, ...], list[int]] = {}
    for number, row in enumerate(board):
        tables.setdefault(row.table_key, []).append(number)
    made = list(board)
    for numbers in tables.values():
        found = [{stage: record for stage in Stage if (record := index.of_row(board[n], stage))} for n in numbers]
        for number, stale in zip(numbers, other_code(found), strict=True):
            if stale:
                made[number] = board[number].model_copy(update={"flags": [*board[number].flags, *stale]})
    return made


def _reference_quality(row: Row, index: Index) -> QualityResult | None:
    """The quality with which that of a row is paired; None for the reference itself."""
    record = None if row.is_reference else index.of_row(row, Stage.QUALITY)
    reference = index.reference(record) if record else None
    return reference.quality if reference else None


def _row(bearer: Record, index: Index, texts: dict[str, list[str]]) -> Row:
    """The row of the cell that `bearer`, the newest record with exactly its keys and hardware, describes."""
    cell, here = bearer.cell, bearer.hardware.fingerprint
    found = {stage: record for stage in Stage if (record := index.of(stage, cell.keys, here))}
    compress, quality, speed = (found.get(stage) for stage in Stage)
    is_reference = cell.keys.compress == cell.reference.compress
    reference = None if is_reference or not quality else index.reference(quality)
    simulated = bool(compress and compress.simulated)
    status, reason = _outcome(found, _expected(bearer, simulated))
    evidences = [r.evidence for r in (quality and quality.quality, speed and speed.speed) if r and r.evidence]
    result = quality.quality if quality and quality.quality else QualityResult()
    theirs = reference.quality if reference else None
    texts_measured, tasks = perplexity(result, theirs), accuracy(result, theirs)
    measured = speed or quality or bearer
    imported = measured.imported
    rival = None if is_reference or not speed else index.reference(speed)
    identity = Identity(
        model=cell.model,
        pipeline=steps.label(cell),
        family=cell.family,
        methods=[str(step.get("method") or step.get("name") or cell.pipeline) for step in cell.steps],
        parameters=cell.parameters,
        engine=cell.engine,
        kernel=next((e.kernel for e in reversed(evidences) if e.kernel), None),
        device=cell.device,
        status=status,
        source_precision=cell.source_precision,
        dtype=cell.dtype,
        suite=cell.suite,
        suite_changes=changes.changes(_section(bearer, "suite")),
        suite_protocol=_digest(_protocol(bearer, "suite"), texts.get(cell.reference.quality, [])),
        speed=cell.speed,
        speed_protocol=_digest(_protocol(bearer, "speed")),
        hardware=measured.hardware.label,
        fingerprint=here,
        seed=cell.seed,
        flags=flags(bearer, found, rival, theirs, texts_measured.perplexity_delta_percent, losses(tasks)),
        foreign=bearer.foreign,
        imported=imported.label if imported else None,
        reason=reason,
        is_reference=is_reference,
        keys=cell.keys,
        calibration=cell.calibration,
        command=steps.command(_command(bearer.command), cell),
        provenance=_provenance(measured),
    )
    return Row.of(
        identity,
        texts_measured,
        divergence(result, theirs),
        Fidelity() if is_reference else fidelity(result, theirs, index.measured(cell.reference.compress)),
        tasks,
        speeds.speed(speed.speed) if speed and speed.speed and not simulated else Speed(),
        _size(bearer, compress, evidences[0] if evidences else None),
        _cost(compress),
        _cache(compress, result),
        retrieval(result.retrieval, theirs.retrieval if theirs else [], is_reference, identity.flags),
        _held(work(quality.quality if quality else None, speed.speed if speed and not simulated else None), result),
        calibration(bearer),
    )


def _expected(bearer: Record, simulated: bool) -> list[Stage]:
    """The stages that the cell was asked for: random weights have no quality, simulated artefacts no speed, imported cells one stage."""
    if bearer.imported:
        return [bearer.stage]
    wanted = bearer.config.get("stages", list(Stage))
    without = {Stage.QUALITY} if _section(bearer, "model").get("source") == "random" else set()
    without |= {Stage.SPEED} if simulated else set()
    return [stage for stage in Stage if stage not in without and (stage is Stage.COMPRESS or stage in wanted)]


def _outcome(found: dict[Stage, Record], expected: Sequence[Stage]) -> tuple[str, str | None]:
    """Status of the row and, unless it is ok, one line that says why."""
    for status in _WORST_FIRST:
        for record in found.values():
            if record.status is status:
                return status.value, _reason(record)
    missing = [stage.value for stage in expected if stage not in found]
    return (INCOMPLETE, f"no record of {' and '.join(missing)}") if missing else (Status.OK.value, None)


def _reason(record: Record) -> str:
    where = record.stage.value if record.phase in ("", record.stage.value) else f"{record.stage.value}, {record.phase}"
    if record.failure is None:
        return f"{where}: {record.status.value}"
    kind = "" if record.status is Status.UNSUPPORTED else f"{record.failure.type}: "
    peak = f" (peak memory {record.peak_memory_bytes / 1e9:.1f} GB)" if record.status is Status.OOM and record.peak_memory_bytes else ""
    return f"{where}: {kind}{record.failure.summary}{peak}"


def _size(bearer: Record, record: Record | None, evidence: Evidence | None) -> Size:
    result = record.compress if record else None
    return Size(
        format=result.claim.format if result else None,
        grid=steps.grid(bearer.cell),
        weight_bytes=evidence.weight_bytes if evidence else None,
        offloaded_bytes=evidence.offloaded_bytes if evidence else None,
        disk_bytes=result.disk_bytes if result else None,
        compression_ratio=result.dense_bytes / result.disk_bytes if result and result.disk_bytes else None,
        effective_bits=evidence.effective_bits if evidence else None,
        sparsity=evidence.sparsity if evidence else None,
        removed=1 - evidence.parameters / bearer.cell.parameters if evidence and bearer.cell.parameters else None,
    )


def _cost(record: Record | None) -> Cost:
    if record is None:
        return Cost()
    result = record.compress
    if result is None:
        return Cost(peak_memory_bytes=record.peak_memory_bytes)
    return Cost(
        compress_seconds=result.seconds,
        compress_cpu_seconds=result.cpu_seconds,
        compress_device_hours=None if result.device_seconds is None else result.device_seconds / 3600,
        peak_memory_bytes=record.peak_memory_bytes,
        peak_device_bytes=result.peak_device_bytes,
        calibration_tokens=result.calibration_tokens,
        training_tokens=result.training_tokens,
        trained_parameters=result.trained_parameters,
        tuning_free=result.tuning_free,
    )


def _cache(record: Record | None, quality: QualityResult) -> Cache:
    details = record.compress.claim.details if record and record.compress else {}
    return Cache.of_sizes(details.get("cache_bytes"), quality.perplexity[0].exact_keys if quality.perplexity else None)


def _held(found: Work, quality: QualityResult) -> Work:
    """The work of a row; where texts were scored behind prompts, with the bytes that were held meanwhile: what a policy keeps of a prompt
    and what came after it.
    """
    head = quality.perplexity[0] if quality.perplexity else None
    if head is None or head.protocol.partition("-")[0] != "suffix":
        return found
    held = {"held_cache_bytes": round(fmean(head.held_bytes)), "held_cache_of": "suffix"} if head.held_bytes else {}
    return found.model_copy(update={"held_cache_bytes": None, "held_cache_of": None} | held)


def _with_dense_caches(board: Sequence[Row], index: Index) -> list[Row]:
    """The rows; references with the bytes of their cache, which the claims of rows of the same model and dtype tell beside their own."""
    dense: dict[tuple[str, str | None], Cache] = {}
    for row in board:
        record = index.of_row(row, Stage.COMPRESS) if row.cache_bytes_1k else None
        if record and record.compress:
            dense[row.model, row.dtype] = Cache.of_sizes(record.compress.claim.details.get("dense_cache_bytes"))
    return [
        row.model_copy(update=found.model_dump(exclude={"exact_keys"}))
        if row.is_reference and (found := dense.get((row.model, row.dtype)))
        else row
        for row in board
    ]


def _texts(records: Sequence[Record]) -> dict[str, list[str]]:
    """For each quality key of a reference, the texts and tasks on which it and its rivals were measured."""
    seen: dict[str, set[str]] = {}
    digest = lru_cache(maxsize=None)(lambda asked: _digest([list(item) for item in zip(*asked, strict=True)]))
    for record in records:
        if record.quality:
            texts = {f"{p.protocol} {p.corpus_sha256} {p.seqlen}" for p in record.quality.perplexity}
            tasks = {f"{t.task} {t.version} {t.metric} {digest(items_of(t)[-1])}" for t in record.quality.zeroshot}
            written = {" ".join(map(str, prompts_of(record.quality.generation)))} if record.quality.generation else set()
            seen.setdefault(record.cell.reference.quality, set()).update(texts | tasks | written)
    return {key: sorted(texts) for key, texts in seen.items()}


def _section(record: Record, name: str) -> dict[str, Any]:
    section = record.config.get(name)
    return section if isinstance(section, dict) else {}


def _protocol(record: Record, name: str) -> dict[str, Any]:
    """The part of the configuration that defines the numbers; the name where the record has none."""
    fields = changes.protocol(_section(record, name))
    return fields or {"name": getattr(record.cell, name)}


def _digest(*values: Any) -> str:
    return short_hash(json.dumps(values, sort_keys=True, default=str))[:8]


def _command(text: str) -> str:
    """A command without what chose which stages ran that time."""
    return " ".join(word for word in _WORD.findall(text) if not word.lstrip("'+").startswith(("stages=", "on_existing=")))


def _provenance(record: Record) -> dict[str, str]:
    facts = record.provenance
    git, packages = (value if isinstance(value := facts.get(name), dict) else {} for name in ("git", "packages"))
    lines = {
        "measured": record.started,
        "slimbench": facts.get("slimbench"),
        "commit": f"{git['commit']}{' + changes' if git.get('dirty') else ''}" if git.get("commit") else None,
        "python": facts.get("python"),
        **{name: packages.get(name) for name in _LIBRARIES},
        "os": facts.get("os"),
    }
    return {name: str(value) for name, value in lines.items() if value}
