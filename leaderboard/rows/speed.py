"""Speed, memory and energy of one stage as fields of a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from slimbench.harness.schema.speed import SpeedPointResult, SpeedResult
from slimbench.harness.stats import bootstrap, speedups
from slimbench.harness.stats import intervals as stats
from slimbench.leaderboard.rows.row import named

_OTHER_STATE = 0.2


def fields(result: SpeedResult) -> dict[str, Any]:
    """The fields of a row that its speed stage gives; those of one grid point are of the first one, the headline."""
    memory = result.memory
    found: dict[str, Any] = {
        "kv_cache_bytes": memory.kv_cache_bytes,
        "activation_bytes": memory.activation_bytes,
        "process_peak_bytes": memory.process_peak_bytes,
        "largest_batch": result.largest_batch.batch if result.largest_batch else None,
        "speed_points": [_point(point) for point in result.points],
    }
    if not result.points:
        return found
    head, numbers = result.points[0], found["speed_points"][0]
    found["speed_point"] = f"batch {head.batch}, prompt {head.prompt}, new {head.new_tokens}"
    found["energy_j_per_token"] = head.energy.joules_per_token if head.energy else None
    found["energy_reason"] = head.energy.reason if head.energy else None
    found["copy_bandwidth_gbs"] = _bandwidth(result)
    return found | {name: value for name, value in numbers.items() if name not in ("batch", "prompt", "new_tokens")}


def disturbances(ours: SpeedResult, theirs: SpeedResult | None) -> list[str]:
    """A flag where the machine was in another state than when the reference's own row was measured."""
    now, then = _bandwidth(ours), _bandwidth(theirs) if theirs else None
    if now is None or then is None or abs(now / then - 1) <= _OTHER_STATE:
        return []
    return [f"measured at {now:.0f} GB/s of copy bandwidth, the reference's row at {then:.0f}: compare speed-ups, not tokens/s"]


def _bandwidth(result: SpeedResult) -> float | None:
    """Median of the copy-bandwidth probes around the headline point, GB/s."""
    return median(probe.copy_gbs for probe in result.points[0].probes) if result.points and result.points[0].probes else None


def _point(point: SpeedPointResult) -> dict[str, float | int | str | None]:
    """The numbers of one point of the grid, under the names that the row gives them."""
    ours, theirs = point.candidate, point.reference
    numbers: dict[str, float | int | str | None] = {"batch": point.batch, "prompt": point.prompt, "new_tokens": point.new_tokens}
    numbers |= named("prefill_ms prefill_low prefill_high", _median, ours.prefill_ms)
    numbers |= named("decode_tokens_per_s decode_low decode_high", _rate, ours.decode_ms)
    if theirs:
        numbers |= named("speedup speedup_low speedup_high", speedup, ours.decode_ms, theirs.decode_ms)
    rate = numbers.get("decode_tokens_per_s")
    numbers["throughput_tokens_per_s"] = point.batch * rate if isinstance(rate, float) else None
    numbers["roofline_fraction"] = point.roofline.fraction if point.roofline else None
    return numbers


def _median(values: Sequence[float]) -> tuple[float, float, float]:
    """Median and bounds; no bounds for fewer samples than can carry them."""
    low, high = stats.median_interval(values)
    return (median(values), low, high) if len(values) >= stats.FEWEST_FOR_MEDIAN else (median(values), *bootstrap.UNDEFINED)


def _rate(milliseconds: Sequence[float]) -> tuple[float, ...]:
    """Tokens per second with bounds, from milliseconds per token."""
    middle, low, high = _median(milliseconds)
    return tuple(1000 / ms if ms > 0 else math.nan for ms in (middle, high, low))


def speedup(candidate_ms: Sequence[float], reference_ms: Sequence[float]) -> tuple[float, float, float]:
    ratio, low, high = speedups.paired_speedup(candidate_ms, reference_ms)
    return (ratio, low, high) if len(candidate_ms) >= stats.FEWEST_FOR_MEDIAN else (ratio, *bootstrap.UNDEFINED)
