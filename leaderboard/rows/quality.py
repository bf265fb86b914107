"""The quality of a row: what a result says alone, and paired with that of the reference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from slimbench.harness.schema.quality import DivergenceResult, DocumentResult, PerplexityResult, QualityResult, ZeroshotResult
from slimbench.harness.stats import intervals as stats
from slimbench.harness.stats import significance
from slimbench.harness.stats.significance import LEVEL, Flips
from slimbench.leaderboard.rows.pairing import name_of, partners, shared_items, windows_of
from slimbench.leaderboard.rows.row import named
from slimbench.tasks import zeroshot

OTHER = "other"

Paired = list[tuple[ZeroshotResult, ZeroshotResult | None]]


def fields(ours: QualityResult, theirs: QualityResult | None) -> dict[str, Any]:
    """The quality fields of a `Row`.

    Args:
        ours: What was measured.
        theirs: The same of the reference; None for the reference itself or where it has no result.
    """
    found: dict[str, Any] = {}
    if ours.perplexity:
        found |= _perplexity(ours.perplexity, theirs.perplexity if theirs else [])
        if divergence := ours.perplexity[0].divergence:
            found |= _divergence(divergence)
    found["perplexity_by_protocol"] = {name_of(p): _value(p) for p in ours.perplexity} | _documents(ours.documents)
    if ours.zeroshot:
        paired = shared_items(ours.zeroshot, theirs.zeroshot if theirs else [])
        flips = {o.task: significance.flips(o.correctness, t.correctness) for o, t in paired if t}
        found |= _accuracy(paired, flips)
        found |= _versatility(found["task_accuracy"], found["task_delta"])
        found |= _worst(paired, flips)
    return found


def losses(found: Mapping[str, Any]) -> list[str]:
    """A flag where single tasks drop significantly and the mean does not: the mean alone would hide it."""
    highest = found.get("accuracy_delta_high")
    if highest is None or highest < 0:
        return []
    delta = found["task_delta"]
    lost = [task for task, p in found["task_p"].items() if p < LEVEL and delta[task] < 0]
    lost.sort(key=lambda task: delta[task])
    return [f"loses {', '.join(f'{task} (−{-100 * delta[task]:.0f} points)' for task in lost)} while the mean holds"] if lost else []


def _perplexity(ours: list[PerplexityResult], theirs: list[PerplexityResult]) -> dict[str, Any]:
    head, shared = partners(ours[:1], theirs, windows_of)[0]
    same_protocol = [p for p in ours if (p.protocol, p.seqlen) == (head.protocol, head.seqlen)]
    found: dict[str, Any] = {
        "corpus": head.corpus,
        "perplexities": {p.corpus: _value(p) for p in same_protocol},
        "perplexity": _value(head),
        "calibration_overlap": head.calibration_overlap,
    }
    found |= named("perplexity_low perplexity_high", stats.perplexity_interval, head.window_nll)
    if shared:
        names = "perplexity_delta_percent perplexity_ratio_low perplexity_ratio_high"
        found |= named(names, _relative, head.window_nll, shared.window_nll)
        found |= named("perplexity_p", lambda *nll: [significance.paired_p_value(*nll)], head.window_nll, shared.window_nll)
    found["ood_perplexity_delta_percent"] = {
        p.corpus: 100 * (_value(p) / _value(reference) - 1)
        for p, reference in partners(same_protocol, theirs, windows_of)
        if reference and p.corpus != head.corpus
    }
    return found


def _documents(results: Iterable[DocumentResult]) -> dict[str, float]:
    return {
        f"{name_of(result)} ({unit})": value
        for result in results
        for unit, value in (("word", result.word_perplexity), ("byte", result.byte_perplexity))
    }


def _divergence(result: DivergenceResult) -> dict[str, Any]:
    found = {
        "kl_mean": result.kl_mean,
        "kl_p99": result.kl_p99,
        "top1_agreement": fmean(result.top1_agreement),
        "delta_p": fmean(result.delta_p),
    }
    return found | named("kl_low kl_high", stats.mean_interval, result.kl)


def _accuracy(paired: Paired, flips: Mapping[str, Flips]) -> dict[str, Any]:
    per_task = {ours.task: ours.accuracy for ours, _ in paired}
    items = [ours.correctness for ours, _ in paired]
    shared = [(ours, theirs) for ours, theirs in paired if theirs]
    found: dict[str, Any] = {"task_accuracy": per_task, "accuracy": fmean(per_task.values())}
    found |= named("accuracy_se", lambda tasks: [stats.accuracy_se(tasks)], items) or _reported_error([ours for ours, _ in paired])
    found["task_delta"] = {ours.task: ours.accuracy - theirs.accuracy for ours, theirs in shared}
    if flips:
        adjusted = significance.holm(significance.mcnemar(*zip(*flips.values(), strict=True)))
        found["task_p"] = dict(zip(flips, adjusted.tolist(), strict=True))
    else:
        found["task_p"] = {}
    if len(shared) == len(paired):
        reference = [theirs.correctness for _, theirs in shared]
        found |= named("accuracy_delta accuracy_delta_low accuracy_delta_high", stats.accuracy_delta_interval, items, reference)
        found["accuracy_p"] = significance.accuracy_p_value(items, reference)
        lost, won = (sum(counts) for counts in zip(*flips.values(), strict=True))
        found |= {"flips_to_wrong": lost, "flips_to_right": won, "mcnemar_p": float(significance.mcnemar(lost, won))}
    return found


def _reported_error(tasks: list[ZeroshotResult]) -> dict[str, float]:
    """The standard error from those that the tasks report, for tasks whose items are not known."""
    errors = [task.stderr for task in tasks if task.stderr is not None]
    return {"accuracy_se": math.hypot(*errors) / len(errors)} if len(errors) == len(tasks) else {}


def _versatility(accuracy: Mapping[str, float], delta: Mapping[str, float]) -> dict[str, Any]:
    """Accuracy and its change in each group of tasks; the change only where every task of the group has a partner."""
    groups: dict[str, list[str]] = {}
    known = zeroshot.groups()
    for task in accuracy:
        groups.setdefault(known.get(task, OTHER), []).append(task)
    changes = {group: fmean(delta[t] for t in tasks) for group, tasks in sorted(groups.items()) if all(t in delta for t in tasks)}
    return {
        "group_accuracy": {group: fmean(accuracy[t] for t in tasks) for group, tasks in sorted(groups.items())},
        "group_delta": changes,
        "group_spread": max(changes.values()) - min(changes.values()) if len(changes) > 1 else None,
    }


def _worst(paired: Paired, flips: Mapping[str, Flips]) -> dict[str, Any]:
    """The task that changed for the worst, with an interval that holds for all tasks at once (Bonferroni), as it was chosen."""
    shared = [(ours, theirs) for ours, theirs in paired if theirs]
    if not shared:
        return {}
    ours, theirs = min(shared, key=lambda pair: (pair[0].accuracy - pair[1].accuracy, pair[0].task))
    low, high = stats.flips_interval(*flips[ours.task], len(ours.items), 1 - LEVEL / len(shared))
    delta = ours.accuracy - theirs.accuracy
    return {"worst_task": ours.task, "worst_task_delta": delta, "worst_task_low": low, "worst_task_high": high}


def _relative(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Perplexity above the reference in per cent, and the bounds of their ratio."""
    ratio, low, high = stats.perplexity_ratio_interval(ours, theirs)
    return 100 * (ratio - 1), low, high


def _value(result: PerplexityResult) -> float:
    return named("value", lambda nll: [stats.perplexity(nll)], result.window_nll).get("value", math.nan)
