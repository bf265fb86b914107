"""Speed, memory and energy of a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from statistics import median

import numpy as np

from slimbench.harness.schema.speed import SpeedPointResult, SpeedResult
from slimbench.harness.stats import intervals as stats
from slimbench.harness.stats import speedups
from slimbench.harness.stats.bootstrap import UNDEFINED, UNKNOWN, Estimate, attempt
from slimbench.harness.stats.workload import prompt_speedups, workload_mean
from slimbench.leaderboard.rows.groups import Speed, Timing


def speed(result: SpeedResult) -> Speed:
    """The speed of a row; what belongs to one grid point is of the first one, the headline."""
    timings = [_timing(point) for point in result.points]
    head = result.points[0] if result.points else None
    first = timings[0] if timings else Timing()
    energy = head.energy if head else None
    drawn = "" if result.temperature is None else f", drawn at temperature {result.temperature:g}"
    return Speed(
        speed_point=f"batch {head.batch}, prompt {head.prompt}, new {head.new_tokens}{drawn}" if head else None,
        prefill_ms=first.prefill_ms,
        prefill_low=first.prefill_low,
        prefill_high=first.prefill_high,
        prefill_speedup=first.prefill_speedup,
        prefill_speedup_low=first.prefill_speedup_low,
        prefill_speedup_high=first.prefill_speedup_high,
        decode_tokens_per_s=first.decode_tokens_per_s,
        decode_low=first.decode_low,
        decode_high=first.decode_high,
        speedup=first.speedup,
        speedup_low=first.speedup_low,
        speedup_high=first.speedup_high,
        throughput_tokens_per_s=first.throughput_tokens_per_s,
        speedup_by_prompt=attempt(_by_prompt, head, otherwise={}) if head else {},
        timed_equal=head.tokens.equal if head and head.tokens else None,
        temperature=result.temperature,
        roofline_fraction=first.roofline_fraction,
        roofline_bandwidth=head.roofline.bandwidth if head and head.roofline and head.roofline.fraction is not None else None,
        read_bandwidth_gbs=_bandwidth([probe.read_gbs for probe in head.probes]) if head else None,
        copy_bandwidth_gbs=_bandwidth([probe.copy_gbs for probe in head.probes]) if head else None,
        energy_reason=energy.reason if energy else None,
        energy_j_per_token=energy.joules_per_token if energy else None,
        speed_points=[
            {"batch": point.batch, "prompt": point.prompt, "new_tokens": point.new_tokens} | timing.model_dump()
            for point, timing in zip(result.points, timings, strict=True)
        ],
        kv_cache_bytes=result.memory.kv_cache_bytes,
        activation_bytes=result.memory.activation_bytes,
        process_peak_bytes=result.memory.process_peak_bytes,
        largest_batch=result.largest_batch.batch if result.largest_batch else None,
    )


def _by_prompt(point: SpeedPointResult) -> dict[str, float | None]:
    """How speed-ups are spread over texts; nothing where all runs were of one."""
    numbers = point.prompt_of_pairs
    if point.reference is None or len(set(numbers)) < 2:
        return {}
    found = prompt_speedups(point.candidate.decode_ms, point.reference.decode_ms, numbers)
    names, places = ("least", "p10", "median", "p90", "most"), (0, 10, 50, 90, 100)
    spread: dict[str, float | None] = dict(zip(names, np.percentile(found, places).tolist(), strict=True))
    return spread | {"slower": float((found < 1).mean())}


def _bandwidth(readings: Sequence[float | None]) -> float | None:
    """Median of the readings of a probe, GB/s; None where not all of its readings are known."""
    known = [reading for reading in readings if reading is not None]
    return median(known) if known and len(known) == len(readings) else None


def _timing(point: SpeedPointResult) -> Timing:
    """The numbers of one point of the grid."""
    ours, theirs = point.candidate, point.reference
    prefill = attempt(_middle, ours.prefill_ms, point.processes, point.prompt_of_pairs, otherwise=UNKNOWN)
    decode = attempt(_rate, ours.decode_ms, point.processes, point.prompt_of_pairs, otherwise=UNKNOWN)
    by = partial(speedup, runs=point.processes, prompts=point.prompt_of_pairs)
    ratio = attempt(by, ours.decode_ms, theirs.decode_ms, otherwise=UNKNOWN) if theirs else UNKNOWN
    whole = attempt(by, ours.prefill_ms, theirs.prefill_ms, otherwise=UNKNOWN) if theirs else UNKNOWN
    return Timing(
        prefill_ms=prefill.value,
        prefill_low=prefill.low,
        prefill_high=prefill.high,
        prefill_speedup=whole.value,
        prefill_speedup_low=whole.low,
        prefill_speedup_high=whole.high,
        decode_tokens_per_s=decode.value,
        decode_low=decode.low,
        decode_high=decode.high,
        speedup=ratio.value,
        speedup_low=ratio.low,
        speedup_high=ratio.high,
        throughput_tokens_per_s=point.batch * decode.value,
        roofline_fraction=point.roofline.fraction if point.roofline else None,
    )


def _middle(values: Sequence[float], runs: Sequence[int], prompts: Sequence[int]) -> Estimate:
    """The middle and its bounds, over prompts where they differ; no bounds for fewer samples than can carry them."""
    if len(prompts):
        return workload_mean(values, prompts, runs)
    return _carried(speedups.middle(values, runs), len(values))


def _rate(milliseconds: Sequence[float], runs: Sequence[int], prompts: Sequence[int]) -> Estimate:
    """Tokens per second with bounds, from milliseconds per token."""
    middle, low, high = _middle(milliseconds, runs, prompts)
    return Estimate(*(1000 / ms if ms > 0 else math.nan for ms in (middle, high, low)))


def speedup(
    candidate_ms: Sequence[float], reference_ms: Sequence[float], *, runs: Sequence[int] = (), prompts: Sequence[int] = ()
) -> Estimate:
    return _carried(speedups.paired_speedup(candidate_ms, reference_ms, runs=runs, prompts=prompts), len(candidate_ms))


def _carried(found: Estimate, count: int) -> Estimate:
    return found if count >= stats.FEWEST_FOR_MEDIAN else Estimate(found.value, *UNDEFINED)
