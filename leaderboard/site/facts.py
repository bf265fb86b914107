"""What is known of a cell, in words: pairs of name and text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from slimbench.harness.config.engines import catalogue
from slimbench.harness.stats.significance import LEVEL
from slimbench.leaderboard.flags.kinds import Figure, labelled, spoiling
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.tables.columns import COLUMNS, places, seed_spread
from slimbench.leaderboard.tables.format import EMPTY, decimal, p_text, shorten
from slimbench.leaderboard.tables.resolution import shown_by
from slimbench.leaderboard.tables.sides.cache import CACHE

LONGEST_DETAIL = 2000


def details(row: Row) -> list[tuple[str, str]]:
    """What is known of a row, as pairs of name and text."""
    facts = {
        "Status": f"{row.status}: {row.reason}" if row.reason else row.status,
        "Flags": "; ".join(map(labelled, row.flags)),
        **_quality(row),
        **_speed(row),
        "Kernels": row.kernel,
        "Smaller on disk by": _text(decimal(2), row.compression_ratio, " ×"),
        "Zeros": _text(decimal(1, 100), row.sparsity, " %"),
        "Parameters removed": _text(decimal(1, 100), row.removed, " %"),
        "Artefact": _artefact(row),
        **_cost(row),
        "Source precision": row.source_precision,
        "Calibration": " · ".join(part for part in (row.calibration_text, row.calibration) if part),
        "Seed": f"{row.seed}" + ("" if row.calibration_seed is None else f", of the calibration text {row.calibration_seed}"),
        "Imported from": row.imported,
        "Hardware": f"{row.hardware} · {row.fingerprint}",
        "Keys": f"compress {row.keys.compress} · quality {row.keys.quality} · speed {row.keys.speed}",
        "Provenance": " · ".join(f"{name} {value}" for name, value in row.provenance.items()),
        "Command": row.command,
    }
    return [(name, shorten(value, LONGEST_DETAIL)) for name, value in facts.items() if value and value != EMPTY]


def _artefact(row: Row) -> str:
    """`format huggingface, which transformers, compiled, … load`: where else the cell's artefact may be measured or used.

    An engine that loads no policies and ran the draft of this one by itself is among them.
    """
    if row.format is None:
        return ""
    loading = list(dict.fromkeys([*_loading(row.format), *([row.engine] if row.slots == ["draft"] else [])]))
    return f"format {row.format}, which {', '.join(loading) or 'no engine'} load{'s' if len(loading) < 2 else ''}"


@cache
def _loading(format_: str) -> list[str]:
    return [engine.name for engine in catalogue() if format_ in engine.loaders]


def _quality(row: Row) -> dict[str, str | None]:
    points, nats = decimal(1, 100, signed=True), decimal(4)
    rank = "" if row.rank is None else f"{places(row.rank, row.rank_last)} by perplexity"
    by_accuracy = "" if row.accuracy_rank is None else f"{places(row.accuracy_rank, row.accuracy_rank_last)} by right answers"
    percent = decimal(1, signed=True)
    above = (
        [] if row.perplexity_delta_percent is None else [f"{row.corpus} {percent(row.perplexity_delta_percent)} %{_p(row.perplexity_p)}"]
    )
    further = row.ood_perplexity_delta_percent
    elsewhere = [f"out of domain: {_list(percent, further, ' %')}"] if further else []
    return {
        "Rank": ", ".join(filter(None, (rank, by_accuracy))),
        "Perplexity": _list(decimal(2), row.perplexity_by_protocol),
        "Perplexity above the reference": "; ".join(above + elsewhere),
        "Perplexity over seeds": seed_spread(row),
        "KL from the reference": _span(nats, row.kl_mean, row.kl_low, row.kl_high, " nats")
        + ("" if row.kl_p99 is None else f", 99th percentile {nats(row.kl_p99)}"),
        "KL of the reference from itself": _text(decimal(6), row.kl_noise, " nats at most: other batches, other arithmetic"),
        "Same most likely token": _text(decimal(1, 100), row.top1_agreement, " %"),
        "Change of the true token's probability": _text(decimal(2, 100), row.delta_p, " points"),
        "Same continuations": ""
        if row.continuations is None or row.same_continuations is None
        else f"{row.same_continuations * row.continuations:.0f} of {row.continuations} prompts, {row.continuation_tokens} tokens each",
        "Parted where the reference is undecided": _text(decimal(0, 100), row.divergent_at_ties, " % of the others"),
        "Divergent tokens by kind of prompt": _list(decimal(1, 100), row.divergent_by_kind, " %"),
        "Continuations": "" if row.continuations_reason is None else f"not compared: {row.continuations_reason}",
        "Accuracy % (against the reference)": ", ".join(_task(row, name) for name in row.task_accuracy),
        "Accuracy difference": _span(points, row.accuracy_delta, row.accuracy_delta_low, row.accuracy_delta_high, " points")
        + _p(row.accuracy_p),
        "Verdict on perplexity": _verdict(row, "perplexity"),
        "Verdict on accuracy": _verdict(row, "accuracy"),
        "Changed answers": ""
        if row.flips_to_wrong is None
        else f"{row.flips_to_wrong} right to wrong, {row.flips_to_right} wrong to right{_p(row.mcnemar_p)}",
        "Groups of tasks %": ", ".join(_changed(group, value, row.group_delta.get(group)) for group, value in row.group_accuracy.items())
        + ("" if row.group_spread is None else f"; changes spread over {decimal(1, 100)(row.group_spread)} points"),
        "Exact keys": _text(
            decimal(1, 100), row.exact_keys, f" % of the keys before the tokens that are scored; the others {_otherwise(row)}"
        ),
        "Facts in long contexts": "; ".join(map(_context, row.contexts)),
        "Worst task": ""
        if row.worst_task is None
        else f"{row.worst_task} {_span(points, row.worst_task_delta, row.worst_task_low, row.worst_task_high, ' points')}",
        "Test text in the calibration or taught text": _text(decimal(2, 100), row.calibration_overlap, " % of its n-grams"),
    }


def _otherwise(row: Row) -> str:
    """What a policy does to keys that it does not leave exact."""
    if row.cache_bytes_1k is not None:
        return "are rounded"
    if "cache" in row.slots:
        return "have left the cache, or are not seen as they were"
    return "are not seen, or only summed up" if "attention" in row.slots else "are rounded, not seen or summed up"


def _context(context: Mapping[str, Any]) -> str:
    """`1,024 tokens: 36 % (21 to 52) of those that dense finds, 5.9 MB held, 43 ms a step`."""
    percent = decimal(0, 100)
    said = {
        "{} of those that dense finds": context["score"] is not None
        and _span(percent, context["score"], context["score_low"], context["score_high"], " %"),
        "{} MB held": context["cache_bytes"] is not None and decimal(1, 1e-6)(context["cache_bytes"]),
        "{} ms a step": context["step_ms"] is not None and decimal(0)(context["step_ms"]),
        "no score: {}": context["reason"],
    }
    return f"{context['length']:,} tokens: {', '.join(text.format(value) for text, value in said.items() if value)}"


def _verdict(row: Row, name: str) -> str:
    """`unresolved (p = 0.18); 14 windows would tell; 8 windows can show a difference of 0.5 % (80 % power)`."""
    (column,) = (column for column in COLUMNS if column.key == f"{name}_verdict")
    if column.value(row) == EMPTY:
        return ""
    verdict = f"{column.value(row)}{_p(getattr(row, f'{name}_verdict_p'))}"
    return "; ".join(filter(None, (verdict, column.interval(row), shown_by(row, name))))


def _speed(row: Row) -> dict[str, str | None]:
    megabytes = decimal(1, 1e-6)
    memory = {
        "weights": row.weight_bytes,
        "KV cache": row.kv_cache_bytes,
        "activations and workspace" + " (invalid, see the flags)" * bool(spoiling(row.flags, Figure.MEMORY)): row.activation_bytes,
        "process at its peak": row.process_peak_bytes,
    }
    return {
        "Speed at": row.speed_point,
        "Speed over the grid": "; ".join(map(_point, row.speed_points)) if len(row.speed_points) > 1 else "",
        "Speed-up by text": _by_prompt(row.speedup_by_prompt),
        "Guesses taken": _span(decimal(1, 100), row.acceptance, row.acceptance_low, row.acceptance_high, " %"),
        "Repeated in what was written": _text(decimal(1, 100), row.repeated_4grams, " % of the runs of four tokens"),
        "Timed tokens": _text(decimal(1, 100), row.timed_equal if row.temperature is None else None, " % as the reference's"),
        "Roof": _roof(row),
        "Read bandwidth meanwhile": _text(decimal(1), row.read_bandwidth_gbs, " GB/s"),
        "Copy bandwidth meanwhile": _text(decimal(1), row.copy_bandwidth_gbs, " GB/s"),
        "Memory": ", ".join(f"{name} {megabytes(value)} MB" for name, value in memory.items() if value is not None),
        "Cache of one sequence": _caches(row),
        "Cache of a text": _text(decimal(2, 1e-6), row.held_cache_bytes, f" MB, {_held(row)}"),
        "Largest batch that fits": None if row.largest_batch is None else str(row.largest_batch),
        "Energy": _text(decimal(3), row.energy_j_per_token, " J a token")
        if row.energy_j_per_token is not None
        else f"not measured: {row.energy_reason}"
        if row.energy_reason
        else None,
    }


def _by_prompt(spread: Mapping[str, float | None]) -> str:
    """`0.92 to 3.10, median 1.45, 80 % of the texts within 1.02 to 2.60, 8 % slower`."""
    if not spread or None in spread.values():
        return ""
    number = {name: decimal(2)(value) for name, value in spread.items() if value is not None}
    within = f"80 % of the texts within {number['p10']} to {number['p90']}"
    slower = decimal(0, 100)(spread["slower"] or 0)
    return f"{number['least']} to {number['most']}, median {number['median']}, {within}, {slower} % slower"


def _caches(row: Row) -> str:
    """`1k tokens 5.6 MB, 2k tokens 10.0 MB, …`."""
    sizes = [column for column in CACHE if column.key.startswith("cache_bytes")] if row.cache_bytes_1k else []
    return ", ".join(f"{column.header} tokens {column.value(row)} MB" for column in sizes)


def _held(row: Row) -> str:
    """Which cache `held_cache_bytes` are of."""
    corpus, _, protocol = next(iter(row.perplexity_by_protocol), "").partition(" ")
    scored = bool(corpus) and protocol.startswith("suffix")
    return "mean over the tokens that were scored" if scored else f"the largest at the end of one, behind {row.work_prompt or 0:,} tokens"


def _roof(row: Row) -> str:
    """`43 % of what the read bandwidth allows`; of an older row it says what that bandwidth is not."""
    if row.roofline_fraction is None:
        return ""
    of_copies = "" if row.roofline_bandwidth == "read" else ", measured before reads alone were: these can be faster"
    return f"{decimal(0, 100)(row.roofline_fraction)} % of what the {row.roofline_bandwidth} bandwidth allows{of_copies}"


def _point(point: Mapping[str, Any]) -> str:
    """One point of the grid: `4 × 128 + 17: prefill 310 ms, 96.1 tokens/s, speed-up 1.42`."""
    parts = {
        "prefill {} ms": (decimal(0), point.get("prefill_ms")),
        "{} tokens/s in all": (decimal(1), point.get("throughput_tokens_per_s")),
        "speed-up {}": (decimal(2), point.get("speedup")),
        "{} % of the roof": (decimal(0, 100), point.get("roofline_fraction")),
    }
    told = ", ".join(text.format(form(value)) for text, (form, value) in parts.items() if value is not None)
    return f"{point['batch']} × {point['prompt']} + {point['new_tokens']}: {told}"


def _cost(row: Row) -> dict[str, str | None]:
    seconds = [
        f"{decimal(1)(value)} s {kind}"
        for kind, value in (("of wall time", row.compress_seconds), ("of processor time", row.compress_cpu_seconds))
        if value is not None
    ]
    hours = [] if row.compress_device_hours is None else [f"{decimal(3)(row.compress_device_hours)} device hours"]
    tokens = [
        f"{value:,} {kind} tokens" for kind, value in (("calibration", row.calibration_tokens), ("training", row.training_tokens)) if value
    ]
    trained = [f"{row.trained_parameters:,} trained parameters"] if row.trained_parameters else []
    tuning = [] if row.tuning_free is None else ["no training" if row.tuning_free else "with training"]
    return {
        "Compression took": ", ".join(seconds + hours + tokens + trained + tuning),
        "Peak memory of the compression": _text(decimal(0, 1e-6), row.peak_memory_bytes, " MB"),
    }


def _task(row: Row, name: str) -> str:
    p_value = row.task_p.get(name)
    mark = f", {p_text(p_value)}" if p_value is not None and p_value < LEVEL else ""
    return _changed(name, row.task_accuracy[name], row.task_delta.get(name), mark)


def _changed(name: str, accuracy: float | None, delta: float | None, mark: str = "") -> str:
    """`name 41.2 (−3.1, p = 0.02)`, in per cent."""
    change = "" if delta is None else f" ({decimal(1, 100, signed=True)(delta)}{mark})"
    return f"{name} {_text(decimal(1, 100), accuracy)}{change}"


def _list(form: Callable[[float], str], values: Mapping[str, float | None], unit: str = "") -> str:
    return ", ".join(f"{name} {_text(form, value, unit)}" for name, value in values.items())


def _p(value: float | None) -> str:
    return "" if value is None else f" ({p_text(value)})"


def _text(form: Callable[[float], str], value: float | None, unit: str = "") -> str:
    return EMPTY if value is None else f"{form(value)}{unit}"


def _span(form: Callable[[float], str], value: float | None, low: float | None, high: float | None, unit: str) -> str:
    bounds = "" if low is None or high is None else f" ({_text(form, low)} to {_text(form, high)})"
    return EMPTY if value is None else f"{_text(form, value)}{unit}{bounds}"
