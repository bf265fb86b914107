"""Checks of speed figures: the roofline that none can break, and one line for each fact that makes a figure doubtful."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from slimbench.harness.schema.evidence import Evidence
from slimbench.harness.schema.speed import Probe, Roofline, SpeedPointResult, SpeedResult
from slimbench.harness.schema.work import WorkResult
from slimbench.harness.stats.intervals import FEWEST_FOR_MEDIAN
from slimbench.harness.stats.speedups import middle, paired_speedup
from slimbench.harness.stats.workload import workload_mean

DRIFT = 0.15
"""Change of the machine probe within a point, relative to its median, above which the point is flagged."""

_EXPERTS = re.compile("expert|moe", re.IGNORECASE)


@dataclass(frozen=True)
class Touched:
    """What a token reads, in parts of all that a pass of the whole model reads; None where it was not counted.

    Attributes:
        weights: Of the weights.
        cache: Of the keys and values.
        weight_bytes: What it reads of the weights, where the bytes of each call were counted; goes before `weights`.
        cache_bytes: What it reads of the keys and values, where those that attentions were given were counted; goes before `cache`.
    """

    weights: float | None = 1.0
    cache: float | None = 1.0
    weight_bytes: int | None = None
    cache_bytes: int | None = None


ALL = Touched()


def touched_by(work: WorkResult | None, cache_size: int) -> Touched:
    """What counted calls read: weights once in each call, however many rows it has, and of the cache what attentions were given; where
    that was not seen, all of it once in each pass.

    The model and one that guesses for it have weights, passes and a cache each. A part that fits into the last-level cache may stay there
    from guess to guess: of it no more is taken for granted than one reading a pass.

    Args:
        cache_size: Bytes of the last-level cache.
    """
    if work is None or not work.tokens or not work.calls:
        return Touched(None, None)
    passes, drafted = work.passes or 0, (work.draft_cache_bytes or 0) / (work.cache_bytes or 1)
    cache = ((1 - drafted) * passes + drafted * (work.draft_passes or 0)) / work.tokens
    read = [
        size if (whole := work.part_bytes.get(part, 0)) > cache_size else min(size, whole * passes)
        for part, size in work.read_bytes.items()
    ]
    weights = round(sum(read) / work.tokens) if read else None
    return Touched(sum(work.calls.values()) / work.tokens, cache, weights, work.cache_read_bytes)


def judge(result: SpeedResult, disturbances: Sequence[Sequence[str]], cache_size: int, is_reference: bool, counted: bool = False) -> None:
    """Complete a result whose points are measured: best bandwidths, rooflines, highest load, flags.

    Args:
        disturbances: For each point the flags of its `LoadWatch`.
        cache_size: Bytes of the last-level cache.
        is_reference: Candidate and reference are the same loaded model.
        counted: A policy decides how much a token runs or reads, so that only what was counted is known.
    """
    probes = [probe for point in result.points for probe in point.probes]
    result.copy_bandwidth_gbs = max(probe.copy_gbs for probe in probes)
    result.read_bandwidth_gbs = max((probe.read_gbs for probe in probes if probe.read_gbs), default=None)
    for number, (point, seen) in enumerate(zip(result.points, disturbances, strict=True)):
        if result.evidence:
            work = None if number else result.work  # on the texts of the first point
            touched = touched_by(work, cache_size) if counted else ALL
            point.roofline = roofline(point, result.evidence, result.copy_bandwidth_gbs, result.read_bandwidth_gbs, cache_size, touched)
        result.load = {name: max(value, result.load.get(name, 0.0)) for name, value in point.load.items()}
        result.flags += flags(point, seen, is_reference)


def weights_read(evidence: Evidence) -> int:
    """Bytes of the weights that a decode step reads: each once for the batch, wherever it lies.

    Of an embedding table only a few rows are read, unless it is the head too: then a head has no bytes of its own.
    """
    heads = [layer for layer in evidence.layers if layer.role == "head"]
    tied = not heads or not all(layer.bytes for layer in heads)
    return sum(layer.bytes for layer in evidence.layers if layer.role != "embedding" or tied)


def roofline(
    point: SpeedPointResult,
    evidence: Evidence,
    copy_gbs: float,
    read_gbs: float | None,
    cache_size: int,
    touched: Touched = ALL,
) -> Roofline:
    """The least time that a decode step can take at the measured bandwidth, and the fraction of it that was reached.

    A step reads its weights once, and the KV cache of each sequence. There is no such bound where all of it fits into the cache, or
    where only some of the experts of a mixture are read.

    Args:
        evidence: Of the loaded candidate; gives the bytes of each kind of layer.
        copy_gbs: Best copy bandwidth seen, GB/s.
        read_gbs: Best read bandwidth seen, GB/s; None where points of an earlier version were gone on with: then the copy's is the roof.
        cache_size: Bytes of the last-level cache.
        touched: What a token reads of them, where a policy decides on that.

    Source: Williams, Waterman and Patterson, Roofline, CACM 2009.
    """
    if touched.weights is None or touched.cache is None:
        return Roofline(weight_bytes=0, reason="what a policy reads from token to token was not counted")
    counted, held = touched.weight_bytes, point.kv_cache_bytes
    weights = round(touched.weights * weights_read(evidence)) if counted is None else counted
    cache = touched.cache_bytes if touched.cache_bytes is not None else None if held is None else round(touched.cache * held)
    found = Roofline(weight_bytes=weights, cache_bytes=cache, bandwidth="read" if read_gbs else "copy")
    if any(_EXPERTS.search(layer.layer) for layer in evidence.layers):
        found.reason = "a mixture of experts reads only some of its weights in each step"
    elif cache is None:
        found.reason = "the engine does not show the size of its KV cache"
    elif weights + cache <= cache_size:
        found.reason = "weights and KV cache fit into the last-level cache"
    else:
        found.bound_ms = (weights + cache) / (read_gbs or copy_gbs) / 1e6
        prompts, times = point.prompt_of_pairs, point.candidate.decode_ms
        found.fraction = found.bound_ms / (workload_mean(times, prompts) if prompts else middle(times, point.processes)).value
    return found


def flags(point: SpeedPointResult, disturbances: Sequence[str], is_reference: bool) -> list[str]:
    """What makes the figures of a point doubtful, one line each.

    Args:
        disturbances: What `LoadWatch` saw while the point was measured.
        is_reference: Candidate and reference are the same loaded model (A/A), so that the true speed-up is 1.
    """
    found = list(disturbances)
    if is_reference and point.reference and len(point.reference.decode_ms) >= FEWEST_FOR_MEDIAN:
        times = point.candidate.decode_ms, point.reference.decode_ms
        ratio, low, high = paired_speedup(*times, runs=point.processes, prompts=point.prompt_of_pairs)
        if math.isfinite(high) and not low <= 1 <= high:
            found.append(f"A/A: the reference differs from itself by {abs(ratio - 1):.1%}; the machine was not steady")
    if (drift := _drift(point.probes)) > DRIFT:
        found.append(f"the machine's matrix product changed by {drift:.0%}")
    if (roof := point.roofline) and roof.fraction is not None and roof.fraction > 1:
        found.append(f"roofline: {roof.fraction:.0%} of the measured {roof.bandwidth} bandwidth: a defect of the measurement")
    if point.dropped:
        found.append(f"{point.dropped} pairs of runs dropped: the card was throttled")
    if point.tokens and len(point.tokens.candidate) > len(set(point.prompt_of_pairs) or {0}):
        runs = sum(point.tokens.candidate.values())
        found.append(f"the timed tokens differ from run to run: {len(point.tokens.candidate)} continuations in {runs} runs")
    return [f"{text} ({point.batch}×{point.prompt}+{point.new_tokens})" for text in found]


def _drift(probes: Sequence[Probe]) -> float:
    """Range over median of the matrix products. That of the copy bandwidth says nothing of decode times, so it is no flag."""
    values = [p.matmul_gflops for p in probes if p.matmul_gflops is not None]
    return (max(values) - min(values)) / statistics.median(values) if values else 0.0
