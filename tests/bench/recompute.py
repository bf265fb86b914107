"""`python tests/bench/recompute.py RESULTS TABLE.json`: every figure of a board again, from the raw samples of its records.

Nothing of slimbench is imported: the records are read as JSON and the estimators are those of numpy and scipy, or written here from
their papers. `TABLE.json` is what `slimbench board build` or `slimbench board table --format json` wrote of the same folder. One line
for each figure that differs by more than 1e-9 of itself, and exit code 1 if there is one. Left out: ranks, groups of tasks, what is
no function of kept samples (99th percentile of the KL, costs), and rows of other folders or tools.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

TOLERANCE = 1e-9
"""Largest deviation, relative to the figure."""
SMALLEST = 1e-12
"""Largest deviation of figures next to 0."""
LEVEL, FEWEST_FOR_MEDIAN, RESAMPLES, BATCH = 0.95, 6, 2000, 256
BETWEEN = 0.03

Json = dict[str, Any]
Bounds = tuple[float, float]
UNKNOWN = (math.nan, math.nan)


# Samples to figures


def exp(value: float) -> float:
    """The exponential, infinite where it overflows."""
    with np.errstate(over="ignore"):
        return float(np.exp(value))


def mean_bounds(samples: Sequence[float]) -> Bounds:
    """Percentile bootstrap of a mean, its tails widened for few samples (Hesterberg 2015, arXiv 1411.5279)."""
    values = np.asarray(samples, dtype=float)
    count = len(values)
    if count < 2:
        return UNKNOWN
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    tail = stats.norm.cdf(math.sqrt(count / (count - 1)) * stats.t.ppf((1 - LEVEL) / 2, count - 1))
    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=BATCH,
        confidence_level=1 - 2 * tail,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def median_bounds(samples: Sequence[float]) -> Bounds:
    """The innermost pair of order statistics that holds the median with 95 % (Conover 1999, section 3.2)."""
    ordered, count = sorted(samples), len(samples)
    outside = [2 * stats.binom.cdf(k - 1, count, 0.5) for k in range(1, count // 2 + 1)]
    k = sum(chance <= 1 - LEVEL for chance in outside)
    return (ordered[k - 1], ordered[count - k]) if k and count >= FEWEST_FOR_MEDIAN else UNKNOWN


def middle(samples: Sequence[float], runs: Sequence[int]) -> tuple[float, Bounds]:
    """Median and bounds; of several processes the geometric mean of their medians with Student's bounds over the logarithms."""
    if len(runs) < 2:
        return float(np.median(samples)), median_bounds(samples)
    ends = np.cumsum(runs)
    logs = np.log([np.median(samples[end - count : end]) for end, count in zip(ends, runs, strict=True)])
    found = stats.ttest_1samp(logs, 0).confidence_interval(LEVEL)
    bounds = (math.exp(found.low), math.exp(found.high)) if len(samples) >= FEWEST_FOR_MEDIAN else UNKNOWN
    return math.exp(logs.mean()), bounds


def paired_p(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Paired t-test; 1 for identical samples."""
    return 1.0 if list(ours) == list(theirs) and len(ours) > 1 else float(stats.ttest_rel(ours, theirs).pvalue)


def mcnemar(lost: int, won: int) -> float:
    """Exact test of the answers that changed."""
    return float(stats.binomtest(min(lost, won), lost + won, 0.5).pvalue) if lost + won else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979)."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def adjusted_wald(changes: Sequence[np.ndarray]) -> tuple[float, float]:
    """Mean of the tasks' paired differences and its error, one answer more having changed each way (Bonett and Price 2012, on strata)."""
    added = 1 / len(changes)
    means, variances = [], []
    for change in changes:
        total = len(change) + 2 * added
        mean = float(change.sum()) / total
        means.append(mean)
        variances.append((float((change**2).sum() + 2 * added) / total - mean**2) / total)
    return float(np.mean(means)), math.sqrt(sum(variances)) / len(changes)


def around(middle: float, error: float, level: float = LEVEL) -> Bounds:
    """Normal bounds of a difference of shares."""
    reach = float(stats.norm.ppf(0.5 + level / 2)) * error
    return max(-1.0, middle - reach), min(1.0, middle + reach)


# Records to rows


def artefact(record: Json) -> str | None:
    """What identifies the bytes that a record made or loaded, where it tells: of files `sha256sum * | sha256sum`."""
    files = (record.get("compress") or {}).get("files") or []
    if files and all(file.get("sha256") for file in files):
        lines = [f"{file['sha256']}  {file['name']}\n" for file in sorted(files, key=lambda file: file["name"])]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    evidence = (record.get("quality") or record.get("speed") or {}).get("evidence") or {}
    return evidence.get("artefact")


class Records:
    """A results folder: of each stage, key and hardware the newest record."""

    def __init__(self, folder: Path) -> None:
        self.parts = {file.stem: json.loads(file.read_text()) for file in (folder / "shared").glob("*.json")}
        self.all: list[Json] = [json.loads(file.read_text()) for file in sorted(folder.glob("*/*/*.json")) if file.parts[-3] != "shared"]
        self.all = sorted((r for r in self.all if r["status"] != "transient" and not r.get("imported")), key=lambda r: r["started"])
        self.newest: dict[tuple[str, str], dict[str, Json]] = defaultdict(dict)
        for record in self.all:
            known = self.newest[record["stage"], record["key"]]
            known.pop(record["hardware"]["fingerprint"], None)
            known[record["hardware"]["fingerprint"]] = record

    def of(self, stage: str, keys: Json, hardware: str) -> Json | None:
        """Of a stage on some hardware; for compression and quality that of other hardware where there is none.

        Then one of the bytes that the row's own records name goes first, then one from before them, then the next one after.
        """
        here = {name: self.newest.get((name, key), {}).get(hardware) for name, key in keys.items()}
        if here[stage] or stage == "speed":
            return here[stage]
        mine = [record for record in here.values() if record]
        loaded = {artefact(record) for record in mine} - {None}
        last = max((record["started"] for record in mine), default="9999")

        def fits(record: Json) -> tuple[bool, bool, float]:
            late = record["started"] > last
            moment = datetime.fromisoformat(record["started"]).timestamp()
            return artefact(record) in loaded, not late, -moment if late else moment

        return max(self.newest.get((stage, keys[stage]), {}).values(), key=fits, default=None)

    def reference(self, quality: Json) -> Json | None:
        """What a quality was compared with: dense on the same hardware, on any for records from before hardware was told apart."""
        known = self.newest.get(("quality", quality["cell"]["reference"]["quality"]), {})
        same = known.get(quality["hardware"]["fingerprint"])
        return same or (next(reversed(known.values()), None) if quality["cell"].get("former_keys") else None)

    def places(self) -> set[tuple[str, str, str, str]]:
        """Keys and hardware of every row: a processor that only compressed what a card measures has none."""
        found = set()
        for record in self.all:
            compressed_on = record["config"].get("device", {}).get("compress")
            if record["stage"] != "compress" or compressed_on in (None, record["cell"]["device"]):
                found.add((*(record["cell"]["keys"][s] for s in ("compress", "quality", "speed")), record["hardware"]["fingerprint"]))
        return found

    def whole(self, part: Json) -> Json:
        """A part of a record with what it shares with other records."""
        own = dict(part)
        return self.parts[own.pop("$shared")] | own if "$shared" in own else own


def figures(row: Json, records: Records) -> Json:
    """What the records say of a row, under the names of its fields."""
    hardware, keys = row["fingerprint"], row["keys"]
    compress, quality, speed = (records.of(stage, keys, hardware) for stage in ("compress", "quality", "speed"))
    found = size(compress, quality, speed)
    if quality and quality.get("quality"):
        is_reference = keys["compress"] == quality["cell"]["reference"]["compress"]
        reference = None if is_reference else records.reference(quality)
        theirs = (reference or {}).get("quality") or {}
        found |= texts(quality["quality"], theirs) | tasks(quality["quality"], theirs, records)
        found |= continuations(quality["quality"].get("generation"), theirs.get("generation"), records)
        found |= facts(quality["quality"], None if is_reference else theirs, [context["reason"] for context in row["contexts"]])
    simulated = compress and compress.get("compress") and compress["compress"]["claim"].get("simulated")
    if speed and speed.get("speed") and not simulated:
        found |= timing(speed["speed"])
    return found


def texts(ours: Json, theirs: Json) -> Json:
    """Perplexity and divergence."""
    if not ours.get("perplexity"):
        return {}

    def windows(result: Json) -> tuple[Any, ...]:
        shape = (result[name] for name in ("protocol", "corpus_sha256", "seqlen", "labels_per_window"))
        return *shape, len(result["window_nll"])

    def counted(result: Json) -> list[float]:
        """Of a stream the stretches within the positions that the model was made for."""
        return list(result["window_nll"][: result.get("within")])

    head = ours["perplexity"][0]
    partners = {windows(result): result for result in reversed(theirs.get("perplexity") or [])}
    nll = np.array(counted(head))
    low, high = mean_bounds(nll)
    alike = [p for p in ours["perplexity"] if (p["protocol"], p["seqlen"]) == (head["protocol"], head["seqlen"])]
    found: Json = {"perplexity": exp(nll.mean()), "perplexity_low": exp(low), "perplexity_high": exp(high)}
    found["perplexities"] = {p["corpus"]: exp(np.mean(counted(p))) for p in alike}
    if partner := partners.get(windows(head)):
        difference = nll - np.array(counted(partner))
        low, high = mean_bounds(difference)
        found |= {"perplexity_delta_percent": 100 * (exp(difference.mean()) - 1), "perplexity_p": paired_p(nll, counted(partner))}
        found |= {"perplexity_ratio_low": exp(low), "perplexity_ratio_high": exp(high)}
    if divergence := head.get("divergence"):
        found["kl_mean"] = float(np.mean(divergence["kl"]))
        found["kl_low"], found["kl_high"] = mean_bounds(divergence["kl"])
        found |= {name: float(np.mean(divergence[name])) for name in ("top1_agreement", "delta_p")}
    return found


def tasks(ours: Json, theirs: Json, records: Records) -> Json:
    """Zero-shot tasks: accuracies, and what changed against the reference on the same items."""

    def asked(task: Json) -> tuple[Any, ...]:
        items = records.whole(task["items"])
        return *(task[name] for name in ("task", "version", "metric", "num_fewshot")), tuple(items["ids"]), tuple(items["hashes"])

    measured = ours.get("zeroshot") or []
    if not measured:
        return {}
    right = {task["task"]: np.array(records.whole(task["items"])["correct"], dtype=float) for task in measured}
    partners = {asked(task): np.array(records.whole(task["items"])["correct"], dtype=float) for task in theirs.get("zeroshot") or []}
    changes = {task["task"]: right[task["task"]] - partners[asked(task)] for task in measured if asked(task) in partners}
    errors = [values.var(ddof=1) / len(values) for values in right.values()]
    found: Json = {
        "accuracy": float(np.mean([values.mean() for values in right.values()])),
        "accuracy_se": math.sqrt(sum(errors)) / len(errors),
        "task_accuracy": {name: float(values.mean()) for name, values in right.items()},
        "task_delta": {name: float(change.mean()) for name, change in changes.items()},
    }
    lost = {name: int((change < 0).sum()) for name, change in changes.items()}
    won = {name: int((change > 0).sum()) for name, change in changes.items()}
    found["task_p"] = dict(zip(changes, holm([mcnemar(lost[name], won[name]) for name in changes]), strict=True))
    if changes:
        worst = min(changes, key=lambda name: (changes[name].mean(), name))
        single = adjusted_wald([changes[worst]])
        found |= {"worst_task": worst, "worst_task_delta": float(changes[worst].mean())}
        found["worst_task_low"], found["worst_task_high"] = around(*single, 1 - (1 - LEVEL) / len(changes))
    if len(changes) == len(measured):
        middle, error = adjusted_wald(list(changes.values()))
        found |= {"accuracy_delta": float(np.mean([change.mean() for change in changes.values()]))}
        found["accuracy_delta_low"], found["accuracy_delta_high"] = around(middle, error)
        found |= {"accuracy_p": float(2 * stats.norm.sf(abs(middle / error))), "mcnemar_p": mcnemar(sum(lost.values()), sum(won.values()))}
        found |= {"flips_to_wrong": sum(lost.values()), "flips_to_right": sum(won.values())}
    return found


def continuations(ours: Json | None, theirs: Json | None, records: Records) -> Json:
    """First divergent token and share of divergent tokens of greedy continuations, over prompts."""
    if not ours or not theirs:
        return {}
    asked, known = (records.whole(side["asked"]) for side in (ours, theirs))
    if [ours["protocol"], ours["length"], asked["sha256"]] != [theirs["protocol"], theirs["length"], known["sha256"]]:
        return {}
    mine, other = (np.array([text.split() for text in side["tokens"]]) for side in (ours, theirs))
    differs = mine != other
    first = np.where(differs.any(1), differs.argmax(1), ours["length"]).astype(float)
    share, kinds = differs.mean(1), np.array(asked["kinds"])
    found: Json = {"continuations": len(share), "continuation_tokens": ours["length"]}
    found |= {"first_divergent": float(first.mean()), "divergent_share": float(share.mean())}
    found["first_divergent_low"], found["first_divergent_high"] = mean_bounds(first)
    found["divergent_low"], found["divergent_high"] = mean_bounds(share)
    found["same_continuations"] = float((share == 0).mean())
    parted = [str(int(at)) in text.split() for at, text, lost in zip(first, theirs.get("ties", []), share, strict=False) if lost]
    found["divergent_at_ties"] = float(np.mean(parted)) if parted else None
    found["divergent_by_kind"] = {str(kind): float(share[kinds == kind].mean()) for kind in set(kinds)}
    return found


def facts(ours: Json, theirs: Json | None, reasons: list[str | None]) -> Json:
    """What is found in long contexts of what dense finds; `theirs` is None for dense itself. Where there is a reason there is no score."""

    def asked(result: Json) -> tuple[Any, ...]:
        return tuple(result[name] for name in ("protocol", "corpus_sha256", "length", "items_sha256")) + tuple(result["context"])

    known = {asked(result): result for result in (theirs or {}).get("retrieval") or []}
    found = []
    for own, reason in zip(ours.get("retrieval") or [], reasons, strict=True):
        dense = own if theirs is None else known.get(asked(own))
        line = {"length": own["length"], "items": len(own["correct"]), "answered": sum(own["correct"]), "cache_bytes": own["cache_bytes"]}
        line |= {"step_ms": float(np.median(own["step_ms"])), "reason": reason}
        if dense:
            line |= {"dense_answers": sum(dense["correct"]), "left_out": len(own["correct"]) - sum(dense["correct"])}
            line |= {"dense_cache_bytes": dense["cache_bytes"], "dense_step_ms": float(np.median(dense["step_ms"]))}
            if not reason:
                line["score"] = 1.0
            if not reason and theirs is not None:
                line["score"], (line["score_low"], line["score_high"]) = clustered(own, dense)
        found.append(line)
    return {"contexts": found}


def clustered(ours: Json, dense: Json) -> tuple[float, Bounds]:
    """Share of the items of dense with Wilson's bounds, for as many items as would say as much if each had a context of its own."""
    items = [(number, right) for number, right, asked in zip(ours["context"], ours["correct"], dense["correct"], strict=True) if asked]
    places = sorted({number for number, _ in items})
    own = [np.array([right for number, right in items if number == place]) for place in places]
    total, clusters = len(items), len(own)
    share = sum(part.sum() for part in own) / total
    spread = clusters / (clusters - 1) * sum((part - share).sum() ** 2 for part in own) / total**2
    alone = share * (1 - share) / total
    normal = stats.norm.ppf((1 + LEVEL) / 2)
    count = total / (max(1.0, spread / alone) if alone else 1.0) * (normal / stats.t.ppf((1 + LEVEL) / 2, clusters - 1)) ** 2
    centre = (share + normal**2 / (2 * count)) / (1 + normal**2 / count)
    error = normal / (1 + normal**2 / count) * math.sqrt(share * (1 - share) / count + normal**2 / (4 * count**2))
    return float(share), (max(0.0, min(share, centre - error)), min(1.0, max(share, centre + error)))


def by_text(values: list[float], texts: list[int]) -> np.ndarray:
    """Mean of each text, in the order of their numbers."""
    return np.array([np.mean([value for value, text in zip(values, texts, strict=True) if text == one]) for one in sorted(set(texts))])


def of_texts(values: list[float], texts: list[int], runs: list[int]) -> tuple[float, Bounds]:
    """Mean over texts of their means; it varies by texts, and by processes."""
    means, ends = by_text(values, texts), np.cumsum(runs or [len(values)])
    own = [by_text(values[end - size : end], texts[end - size : end]) for end, size in zip(ends, runs or [len(values)], strict=True)]
    count, processes = len(means), len(own)
    variance = sum(((part - part.mean()) ** 2).sum() for part in own) / (count - processes)
    square = stats.t.ppf((1 + LEVEL) / 2, count - processes) ** 2 * variance / count
    if processes > 1:
        apart = max(0.0, np.var([part.mean() for part in own], ddof=1) - np.mean([variance / len(part) for part in own]))
        least = (stats.norm.ppf((1 + LEVEL) / 2) * BETWEEN * means.mean()) ** 2
        square += max(stats.t.ppf((1 + LEVEL) / 2, processes - 1) ** 2 * apart, least) / processes
    return float(means.mean()), (float(means.mean() - math.sqrt(square)), float(means.mean() + math.sqrt(square)))


def workload(ours: list[float], theirs: list[float], texts: list[int], runs: list[int]) -> tuple[float, Bounds]:
    """Sum of the texts' means of the reference over that of the candidate; its logarithm varies by texts, and by processes."""
    ratio = float(by_text(theirs, texts).sum() / by_text(ours, texts).sum())
    ends = np.cumsum(runs or [len(ours)])
    parts = [slice(end - size, end) for end, size in zip(ends, runs or [len(ours)], strict=True)]
    own = [(by_text(ours[part], texts[part]), by_text(theirs[part], texts[part])) for part in parts]
    ratios = [other.sum() / mine.sum() for mine, other in own]
    errors = np.concatenate([other - part * mine for part, (mine, other) in zip(ratios, own, strict=True)])
    count, processes = len(set(texts)), len(own)
    variance = (errors**2).sum() / (count - processes) / by_text(theirs, texts).mean() ** 2
    square = stats.t.ppf((1 + LEVEL) / 2, count - processes) ** 2 * variance / count
    if processes > 1:
        apart = max(0.0, np.log(ratios).var(ddof=1) - np.mean([variance / len(mine) for mine, _ in own]))
        seen = stats.t.ppf((1 + LEVEL) / 2, processes - 1) ** 2 * apart
        square += max(seen, (stats.norm.ppf((1 + LEVEL) / 2) * BETWEEN) ** 2) / processes
    return ratio, (ratio * exp(-math.sqrt(square)), ratio * exp(math.sqrt(square)))


def timing(speed: Json) -> Json:
    """Times, rates and speed-ups of the points; those of the first one are the row's."""
    points = []
    for point in speed["points"]:
        ours, theirs, runs = point["candidate"], point.get("reference"), point.get("processes") or []
        found: Json = {name: point[name] for name in ("batch", "prompt", "new_tokens")}
        texts = (point.get("prompts") or {}).get("pairs") or []
        if ours["prefill_ms"]:
            prefill = of_texts(ours["prefill_ms"], texts, runs) if texts else middle(ours["prefill_ms"], runs)
            found["prefill_ms"], (found["prefill_low"], found["prefill_high"]) = prefill
        if ours["decode_ms"]:
            step, (low, high) = of_texts(ours["decode_ms"], texts, runs) if texts else middle(ours["decode_ms"], runs)
            found |= {"decode_tokens_per_s": 1000 / step, "decode_low": 1000 / high, "decode_high": 1000 / low}
            found["throughput_tokens_per_s"] = point["batch"] * 1000 / step
            if (bound := (point.get("roofline") or {}).get("bound_ms")) is not None:
                found["roofline_fraction"] = bound / step
        if theirs and len(theirs["decode_ms"]) == len(ours["decode_ms"]) > 0:
            ratios = np.array(theirs["decode_ms"]) / np.array(ours["decode_ms"])
            times = ours["decode_ms"], theirs["decode_ms"]
            faster = workload(*times, texts, runs) if texts else middle(ratios.tolist(), runs)
            found["speedup"], (found["speedup_low"], found["speedup_high"]) = faster
        if theirs and len(theirs["prefill_ms"]) == len(ours["prefill_ms"]) > 0:
            ratios = np.array(theirs["prefill_ms"]) / np.array(ours["prefill_ms"])
            times = ours["prefill_ms"], theirs["prefill_ms"]
            faster = workload(*times, texts, runs) if texts else middle(ratios.tolist(), runs)
            found["prefill_speedup"], (found["prefill_speedup_low"], found["prefill_speedup_high"]) = faster
        points.append(found)
    first = {name: value for name, value in points[0].items() if name not in ("batch", "prompt", "new_tokens")} if points else {}
    probes = speed["points"][0].get("probes", []) if points else []
    first["timed_equal"] = (speed["points"][0].get("tokens") or {}).get("equal") if points else None
    readings = {name: [probe.get(f"{name}_gbs") for probe in probes] for name in ("copy", "read")}
    bandwidths = {f"{name}_bandwidth_gbs": float(np.median(seen)) for name, seen in readings.items() if seen and None not in seen}
    return first | {"speed_points": points} | bandwidths


def size(compress: Json | None, quality: Json | None, speed: Json | None) -> Json:
    """Bytes of the files, and of the layers that were found in memory."""
    found: Json = {}
    if compress and (result := compress.get("compress")):
        found["disk_bytes"] = sum(file["bytes"] for file in result["files"])
        found["compression_ratio"] = result["dense_bytes"] / found["disk_bytes"]
    evidence = [e for r in (quality and quality.get("quality"), speed and speed.get("speed")) if r and (e := r.get("evidence"))]
    if evidence:
        layers = evidence[0]["layers"]
        linear = [layer for layer in layers if layer["role"] == "linear"]
        found["weight_bytes"] = sum(layer["bytes"] for layer in layers) - evidence[0].get("offloaded_bytes", 0)
        if linear and evidence[0].get("effective_bits") is not None:
            found["effective_bits"] = 8 * sum(layer["bytes"] for layer in linear) / sum(layer["parameters"] for layer in linear)
    return found


# Both together


COMPARED = (
    *("perplexity", "perplexity_low", "perplexity_high", "perplexity_delta_percent", "perplexity_ratio_low", "perplexity_ratio_high"),
    *("perplexity_p", "perplexities", "kl_mean", "kl_low", "kl_high", "top1_agreement", "delta_p"),
    *("accuracy", "accuracy_se", "accuracy_delta", "accuracy_delta_low", "accuracy_delta_high", "accuracy_p", "task_accuracy"),
    *("task_delta", "task_p", "flips_to_wrong", "flips_to_right", "mcnemar_p"),
    *("worst_task", "worst_task_delta", "worst_task_low", "worst_task_high"),
    *("prefill_speedup", "prefill_speedup_low", "prefill_speedup_high"),
    *("prefill_ms", "prefill_low", "prefill_high", "decode_tokens_per_s", "decode_low", "decode_high", "speedup", "speedup_low"),
    *("speedup_high", "throughput_tokens_per_s", "roofline_fraction", "speed_points", "copy_bandwidth_gbs"),
    "read_bandwidth_gbs",
    *("disk_bytes", "compression_ratio", "weight_bytes", "effective_bits"),
)
WRITTEN = (
    *("continuations", "continuation_tokens", "first_divergent", "first_divergent_low", "first_divergent_high"),
    *("divergent_share", "divergent_low", "divergent_high", "same_continuations", "divergent_by_kind", "timed_equal"),
    "divergent_at_ties",
    "contexts",
)
"""Compared too; records that were made before there were prompts have none of them."""


def deviation(ours: Any, theirs: Any) -> float:
    """Of a figure, relative to it; infinite where only one side has it."""
    known = [value is not None and not (isinstance(value, float) and not math.isfinite(value)) for value in (ours, theirs)]
    if known != [True, True]:
        return math.inf if any(known) else 0.0
    if isinstance(ours, str) or isinstance(theirs, str):
        return 0.0 if ours == theirs else math.inf
    apart = abs(ours - theirs)
    return 0.0 if apart <= SMALLEST else apart / max(abs(ours), abs(theirs))


def pairs(name: str, ours: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    """Figures side by side, those inside mappings and lists one by one."""
    if isinstance(ours, dict) or isinstance(theirs, dict):
        for key in sorted({*(ours or {}), *(theirs or {})}):
            yield from pairs(f"{name}.{key}", (ours or {}).get(key), (theirs or {}).get(key))
    elif isinstance(ours, list) or isinstance(theirs, list):
        ours, theirs = ours or [], theirs or []
        for index in range(max(len(ours), len(theirs))):
            yield from pairs(f"{name}[{index}]", *(side[index] if index < len(side) else {} for side in (ours, theirs)))
    else:
        yield name, ours, theirs


def compare(table: Iterable[Json], records: Records, tell: Callable[[str], None]) -> tuple[int, float, int]:
    """Hold every row of a table against the records; returns how many figures there were, the largest deviation, and the faults."""
    own = [row for row in table if not row["foreign"] and not row["imported"]]
    count, largest, faults = 0, 0.0, 0
    shown = {(*row["keys"].values(), row["fingerprint"]) for row in own}
    for missing in sorted(shown ^ records.places()):
        faults += 1
        tell(f"{'no record' if missing in shown else 'no row'} of {' '.join(missing)}")
    for row in own:
        found = figures(row, records)
        for column in (*COMPARED, *WRITTEN):
            for name, ours, theirs in pairs(column, found.get(column), row[column]):
                apart = deviation(ours, theirs)
                count += theirs is not None
                largest = max(largest, apart)
                if apart > TOLERANCE:
                    faults += 1
                    tell(f"{row['model']} · {row['pipeline']} · {row['engine']}: {name} is {ours!r}, shown {theirs!r}")
    return count, largest, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("table", type=Path)
    given = parser.parse_args()
    table = json.loads(given.table.read_text())
    count, largest, faults = compare(table, Records(given.results), print)
    print(f"{len(table)} rows, {count} figures, largest deviation {largest:.1e}" + (f", {faults} differ" if faults else ""))
    return 1 if faults or "slimbench" in sys.modules else 0


if __name__ == "__main__":
    sys.exit(main())
