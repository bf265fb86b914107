"""Records become rows: one row for each cell, joined by content keys. A pure function; the order of records is without effect."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, median
from typing import Any

from harness import stats
from harness.hardware import Gpu, Hardware, short_hash
from harness.record import PerplexityResult, QualityResult, Record, SpeedResult, Stage, Status, ZeroshotResult
from leaderboard.row import Row

INCOMPLETE = "incomplete"
_WORST_FIRST = (Status.FAILED, Status.OOM, Status.TIMEOUT, Status.DIVERGED, Status.UNSUPPORTED)
_LIBRARIES = ("torch", "transformers", "lm_eval", "llmcompressor", "bitsandbytes", "compressed-tensors", "triton")

Records = dict[tuple[Stage, str], Record]


def rows(records: Iterable[Record]) -> list[Row]:
    """The board: one row for each combination of compress, quality and speed key that any record names.

    Where several records have the same stage and key, the newest counts. Rows are sorted by table, then reference
    first, then perplexity; rows without a result come last.
    """
    oldest_first = sorted(records, key=lambda r: (r.started, r.stage, r.key, r.status, r.wall_seconds, r.command))
    newest: Records = {(r.stage, r.key): r for r in oldest_first}
    cells = {(r.cell.keys.compress, r.cell.keys.quality, r.cell.keys.speed): r for r in oldest_first}
    texts = _texts(oldest_first)
    return sorted((_row(bearer, newest, texts) for bearer in cells.values()), key=_order)


def _order(row: Row) -> tuple[Any, ...]:
    empty = row.perplexity is None and row.decode_tokens_per_s is None
    table = (row.model, row.suite, row.suite_protocol, row.speed, row.speed_protocol, row.device, row.hardware)
    rank = math.inf if row.perplexity is None else row.perplexity
    return (*table, empty, not row.is_reference, rank, row.pipeline, row.engine, *row.keys.model_dump().values())


def _row(bearer: Record, newest: Records, texts: dict[str, list[str]]) -> Row:
    """The row of the cell that `bearer`, the newest record with exactly its keys, describes."""
    cell = bearer.cell
    found = {stage: newest[stage, cell.keys.of(stage)] for stage in Stage if (stage, cell.keys.of(stage)) in newest}
    compress, quality, speed = (found.get(stage) for stage in Stage)
    is_reference = cell.keys.compress == cell.reference.compress
    reference = None if is_reference else newest.get((Stage.QUALITY, cell.reference.quality))
    simulated = bool(compress and compress.compress and compress.compress.claim.get("simulated"))
    status, reason = _outcome(found, _expected(bearer))
    evidences = [r.evidence for r in (quality and quality.quality, speed and speed.speed) if r]
    flags = [flag for evidence in evidences for flag in evidence.flags] + (speed.speed.flags if speed and speed.speed else [])
    if simulated:
        flags.append("simulated: rounded, but stored in the source dtype; no speed figure")
    measured = speed or quality or bearer
    return Row(
        **cell.model_dump(
            include={
                "model",
                "pipeline",
                "family",
                "engine",
                "device",
                "source_precision",
                "dtype",
                "suite",
                "speed",
                "seed",
                "calibration",
            }
        ),
        status=status,
        reason=reason,
        is_reference=is_reference,
        keys=cell.keys,
        hardware=_hardware(measured),
        suite_protocol=_digest(_protocol(bearer, "suite"), texts.get(cell.reference.quality, [])),
        speed_protocol=_digest(_protocol(bearer, "speed")),
        flags=list(dict.fromkeys(flags)),
        command=bearer.command,
        provenance=_provenance(measured),
        **_size(compress),
        **(evidences[0].model_dump(include={"weight_bytes", "effective_bits", "sparsity"}) if evidences else {}),
        kernel=next((e.kernel for e in reversed(evidences) if e.kernel), None),
        **(_quality(quality.quality, reference.quality if reference else None) if quality and quality.quality else {}),
        **(_speed(speed.speed, is_reference) if speed and speed.speed and not simulated else {}),
    )


def _expected(bearer: Record) -> list[Stage]:
    """The stages of a cell: random weights have no quality."""
    random = _section(bearer, "model").get("source") == "random"
    return [stage for stage in Stage if not (random and stage is Stage.QUALITY)]


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
    lines = record.failure.message.strip().splitlines() or ["no message"]
    peak = f" (peak memory {record.peak_memory_bytes / 1e9:.1f} GB)" if record.status is Status.OOM and record.peak_memory_bytes else ""
    return f"{where}: {kind}{lines[0]}{peak}"


def _size(record: Record | None) -> dict[str, Any]:
    if record is None or record.compress is None:
        return {"peak_memory_bytes": record.peak_memory_bytes} if record else {}
    result = record.compress
    return {
        "disk_bytes": result.disk_bytes,
        "compression_ratio": result.dense_bytes / result.disk_bytes if result.disk_bytes else None,
        "compress_seconds": result.seconds,
        "peak_memory_bytes": record.peak_memory_bytes,
    }


def _quality(ours: QualityResult, theirs: QualityResult | None) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if ours.perplexity:
        head = ours.perplexity[0]
        fields |= {
            "corpus": head.corpus,
            "perplexities": {p.corpus: _perplexity(p) for p in ours.perplexity},
            "perplexity": _perplexity(head),
        }
        fields |= _named("perplexity_low perplexity_high", stats.perplexity_interval, head.window_nll)
        if theirs and (shared := _same_corpus(head, theirs.perplexity)):
            names = "perplexity_delta_percent perplexity_ratio_low perplexity_ratio_high"
            fields |= _named(names, _relative, head.window_nll, shared.window_nll)
    if ours.zeroshot:
        fields |= _accuracy(ours.zeroshot, theirs.zeroshot if theirs else [])
    return fields


def _accuracy(ours: list[ZeroshotResult], theirs: list[ZeroshotResult]) -> dict[str, Any]:
    items = [[item.correct for item in task.items] for task in ours]
    per_task = {task.task: task.accuracy for task in ours}
    fields: dict[str, Any] = {"task_accuracy": per_task, "accuracy": fmean(per_task.values())}
    fields |= _named("accuracy_se", lambda tasks: [stats.accuracy_se(tasks)], items)
    reference = {_same_items(task): task for task in theirs}
    shared = [reference.get(_same_items(task)) for task in ours]
    fields["task_delta"] = {t.task: t.accuracy - r.accuracy for t, r in zip(ours, shared, strict=True) if r}
    paired = [[item.correct for item in task.items] for task in shared if task]
    if len(paired) == len(items):
        fields |= _named("accuracy_delta accuracy_delta_low accuracy_delta_high", stats.accuracy_delta_interval, items, paired)
    return fields


def _same_items(task: ZeroshotResult) -> tuple[Any, ...]:
    """What two results must share to be paired."""
    return task.task, task.version, task.metric, task.num_fewshot, tuple((item.id, item.hash) for item in task.items)


def _speed(result: SpeedResult, is_reference: bool) -> dict[str, Any]:
    if not result.points:
        return {}
    point = result.points[0]
    fields: dict[str, Any] = {"speed_point": f"batch {point.batch}, prompt {point.prompt}, new {point.new_tokens}"}
    fields |= _named("prefill_ms prefill_low prefill_high", _median, point.candidate.prefill_ms)
    fields |= _named("decode_tokens_per_s decode_low decode_high", _rate, point.candidate.decode_ms)
    if is_reference:
        fields["speedup"] = 1.0
    elif point.reference:
        fields |= _named("speedup speedup_low speedup_high", stats.paired_speedup, point.candidate.decode_ms, point.reference.decode_ms)
    return fields


def _median(values: list[float]) -> tuple[float, float, float]:
    low, high = stats.median_interval(values)
    return median(values), low, high


def _relative(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Perplexity above the reference in per cent, and the bounds of their ratio."""
    ratio, low, high = stats.perplexity_ratio_interval(ours, theirs)
    return 100 * (ratio - 1), low, high


def _rate(milliseconds: list[float]) -> tuple[float, ...]:
    """Tokens per second with bounds, from milliseconds per token."""
    middle, low, high = _median(milliseconds)
    return tuple(1000 / ms if ms > 0 else math.nan for ms in (middle, high, low))


def _named(names: str, function: Callable[..., Sequence[float]], *samples: Any) -> dict[str, float]:
    """The results of an estimator by name; nothing where the samples do not allow an estimate."""
    try:
        return dict(zip(names.split(), function(*samples), strict=True))
    except ValueError:
        return {}


def _perplexity(result: PerplexityResult) -> float:
    return next(iter(_named("value", lambda nll: [stats.perplexity(nll)], result.window_nll).values()), math.nan)


def _same_corpus(ours: PerplexityResult, candidates: list[PerplexityResult]) -> PerplexityResult | None:
    """The result on the same windows of the same text, or None: only such may be paired."""

    def protocol(p: PerplexityResult) -> tuple[Any, ...]:
        return p.protocol, p.corpus_sha256, p.seqlen, p.labels_per_window, len(p.window_nll)

    return next((p for p in candidates if protocol(p) == protocol(ours)), None)


def _texts(records: Sequence[Record]) -> dict[str, list[str]]:
    """For each quality key of a reference, the texts and tasks on which it and its rivals were measured."""
    seen: dict[str, set[str]] = {}
    for record in records:
        if record.quality:
            texts = {f"{p.protocol} {p.corpus_sha256} {p.seqlen}" for p in record.quality.perplexity}
            tasks = {f"{t.task} {t.version} {t.metric} {_digest([(i.id, i.hash) for i in t.items])}" for t in record.quality.zeroshot}
            seen.setdefault(record.cell.reference.quality, set()).update(texts | tasks)
    return {key: sorted(texts) for key, texts in seen.items()}


def _section(record: Record, name: str) -> dict[str, Any]:
    section = record.config.get(name)
    return section if isinstance(section, dict) else {}


def _protocol(record: Record, name: str) -> dict[str, Any]:
    """The part of the configuration that defines the numbers; the name where the record has none."""
    fields = {k: v for k, v in _section(record, name).items() if k not in ("name", "batch_tokens")}
    return fields or {"name": getattr(record.cell, name)}


def _digest(*values: Any) -> str:
    return short_hash(json.dumps(values, sort_keys=True, default=str))[:8]


def _hardware(record: Record) -> str:
    """The readable fingerprint that is also part of the speed key."""
    try:
        facts = dict(record.provenance["hardware"])
        machine = Hardware(**facts | {"gpus": [Gpu(**gpu) for gpu in facts.get("gpus", [])]})
        return machine.fingerprint(record.cell.device, _section(record, "device").get("index", 0), record.provenance.get("threads") or 0)
    except (KeyError, TypeError, ValueError, IndexError):
        return "unknown hardware"


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
