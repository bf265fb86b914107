"""The quality of a row: what a result says alone, and paired with that of the reference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from slimbench.harness.schema.generation import GenerationResult
from slimbench.harness.schema.quality import DocumentResult, PerplexityResult, QualityResult, ZeroshotResult
from slimbench.harness.schema.record import Record
from slimbench.harness.stats import fidelity as free_running
from slimbench.harness.stats import intervals as stats
from slimbench.harness.stats import significance
from slimbench.harness.stats.bootstrap import UNDEFINED, UNKNOWN, attempt
from slimbench.harness.stats.significance import LEVEL, Flips
from slimbench.leaderboard.rows.groups import Accuracy, Divergence, Fidelity, Perplexity
from slimbench.leaderboard.rows.pairing import name_of, paired_continuations, paired_windows, partners, prompts_of, shared_items, windows_of
from slimbench.tasks import zeroshot

OTHER = "other"


def losses(accuracy: Accuracy) -> list[str]:
    """A flag where single tasks drop significantly and the mean does not: the mean alone would hide it."""
    if accuracy.accuracy_delta_high is None or accuracy.accuracy_delta_high < 0:
        return []
    delta = {task: change for task, change in accuracy.task_delta.items() if change is not None}
    lost = [task for task, p in accuracy.task_p.items() if p is not None and p < LEVEL and delta[task] < 0]
    lost.sort(key=lambda task: delta[task])
    return [f"loses {', '.join(f'{task} (−{-100 * delta[task]:.0f} points)' for task in lost)} while the mean holds"] if lost else []


def perplexity(ours: QualityResult, theirs: QualityResult | None) -> Perplexity:
    """The perplexities of a row.

    Args:
        ours: What was measured.
        theirs: The same of the reference; None for the reference itself or where it has no result.
    """
    by_protocol: dict[str, float | None] = {name_of(p): _value(p) for p in ours.perplexity}
    by_protocol |= _documents(ours.documents)
    if not ours.perplexity:
        return Perplexity(perplexity_by_protocol=by_protocol)
    known = theirs.perplexity if theirs else []
    head = ours.perplexity[0]
    same_protocol = [p for p in ours.perplexity if (p.protocol, p.seqlen) == (head.protocol, head.seqlen)]
    low, high = attempt(stats.perplexity_interval, head.scored, otherwise=UNDEFINED)
    pair = paired_windows(ours, theirs) or ([], [])
    ratio = attempt(stats.perplexity_ratio_interval, *pair, otherwise=UNKNOWN)
    return Perplexity(
        corpus=head.corpus,
        stretches=_stretches(head, "stream"),
        recomputed=next(filter(None, (_stretches(p, "recomputed") for p in ours.perplexity)), []),
        stretch_bytes=head.held_bytes if _stretches(head, "stream") else [],
        perplexity=_value(head),
        perplexity_low=low,
        perplexity_high=high,
        perplexities={p.corpus: _value(p) for p in same_protocol},
        perplexity_by_protocol=by_protocol,
        perplexity_delta_percent=100 * (ratio.value - 1),
        perplexity_ratio_low=ratio.low,
        perplexity_ratio_high=ratio.high,
        perplexity_p=attempt(significance.paired_p_value, *pair, otherwise=math.nan),
        ood_perplexity_delta_percent={
            p.corpus: 100 * (_value(p) / _value(reference) - 1)
            for p, reference in partners(same_protocol, known, windows_of)
            if reference and p.corpus != head.corpus
        },
        calibration_overlap=head.calibration_overlap,
    )


def _stretches(result: PerplexityResult, protocol: str) -> list[float]:
    """Perplexity of each window under a protocol of streams; none under another one, or where a window has none."""
    known = result.protocol.partition("-")[0] == protocol and all(map(math.isfinite, result.window_nll))
    return [math.exp(min(nll, 700.0)) for nll in result.window_nll] if known else []


def divergence(ours: QualityResult, theirs: QualityResult | None) -> Divergence:
    """The distance of a row from its reference on the first text, and what arithmetic alone does there; arguments as of `perplexity`."""
    result = ours.perplexity[0].divergence if ours.perplexity else None
    floor = max((again.kl_mean for head in (theirs or ours).perplexity[:1] for again in head.noise), default=None)
    if result is None:
        return Divergence(kl_noise=floor)
    low, high = attempt(stats.mean_interval, result.kl, otherwise=UNDEFINED)
    return Divergence(
        kl_mean=result.kl_mean,
        kl_low=low,
        kl_high=high,
        kl_p99=result.kl_p99,
        kl_noise=floor,
        top1_agreement=fmean(result.top1_agreement),
        delta_p=fmean(result.delta_p),
    )


def fidelity(ours: QualityResult, theirs: QualityResult | None, dense: Iterable[Record]) -> Fidelity:
    """What a row writes freely, held against the reference on the same engine and hardware.

    Args:
        ours: What was measured.
        theirs: The same of the reference; None where it has no result there.
        dense: Records of the reference's quality on any engine and hardware.
    """
    if ours.generation is None:
        return Fidelity()
    paired = paired_continuations(ours, theirs)
    if not paired:
        return Fidelity(continuations_reason=_uncompared(ours.generation, dense))
    found = free_running.fidelity([apart for _, apart in paired])
    kinds = dict.fromkeys(kind for kind, _ in paired)
    return Fidelity(
        continuations=len(paired),
        continuation_tokens=ours.generation.length,
        first_divergent=found.first.value,
        first_divergent_low=found.first.low,
        first_divergent_high=found.first.high,
        divergent_share=found.divergent.value,
        divergent_low=found.divergent.low,
        divergent_high=found.divergent.high,
        same_continuations=found.same,
        divergent_at_ties=_at_ties([apart for _, apart in paired], theirs),
        divergent_by_kind={kind: fmean(apart.divergent for other, apart in paired if other == kind) for kind in kinds},
    )


def _at_ties(found: Sequence[free_running.Apart], theirs: QualityResult | None) -> float | None:
    """Of the continuations that part from the reference's, the share that part where it is undecided; None without any, or unseen."""
    ties = theirs.generation.ties if theirs and theirs.generation else []
    parted = [apart.first in places for apart, places in zip(found, ties, strict=False) if apart.divergent]
    return fmean(parted) if parted else None


def accuracy(ours: QualityResult, theirs: QualityResult | None) -> Accuracy:
    """The zero-shot tasks of a row; arguments as of `perplexity`."""
    if not ours.zeroshot:
        return Accuracy()
    paired = shared_items(ours.zeroshot, theirs.zeroshot if theirs else [])
    shared = [(task, partner) for task, partner in paired if partner]
    flips = {task.task: significance.flips(task.correctness, partner.correctness) for task, partner in shared}
    whole = shared if len(shared) == len(paired) else []
    items, reference = [task.correctness for task, _ in paired], [partner.correctness for _, partner in whole]
    delta = attempt(stats.accuracy_delta_interval, items, reference, otherwise=UNKNOWN) if whole else UNKNOWN
    lost, won = (sum(counts) for counts in zip(*flips.values(), strict=True)) if whole else (0, 0)
    task_accuracy = {task.task: task.accuracy for task, _ in paired}
    task_delta = {task.task: task.accuracy - partner.accuracy for task, partner in shared}
    group_accuracy, group_delta = _by_group(task_accuracy, task_delta)
    worst, worst_delta, worst_low, worst_high = _worst(shared, flips)
    return Accuracy(
        accuracy=fmean(task_accuracy.values()),
        accuracy_se=attempt(stats.accuracy_se, items, otherwise=_reported_error([task for task, _ in paired])),
        accuracy_delta=delta.value,
        accuracy_delta_low=delta.low,
        accuracy_delta_high=delta.high,
        accuracy_p=significance.accuracy_p_value(items, reference) if whole else None,
        task_accuracy=dict[str, float | None](task_accuracy),
        task_delta=dict[str, float | None](task_delta),
        task_p=_adjusted(flips),
        flips_to_wrong=lost if whole else None,
        flips_to_right=won if whole else None,
        mcnemar_p=float(significance.mcnemar(lost, won)) if whole else None,
        group_accuracy=group_accuracy,
        group_delta=dict[str, float | None](group_delta),
        group_spread=max(group_delta.values()) - min(group_delta.values()) if len(group_delta) > 1 else None,
        worst_task=worst,
        worst_task_delta=worst_delta,
        worst_task_low=worst_low,
        worst_task_high=worst_high,
    )


def _uncompared(written: GenerationResult, dense: Iterable[Record]) -> str:
    """Why continuations are compared with none, and where the reference has any."""
    known = ((record, record.quality.generation) for record in dense if record.quality)
    places = {f"{r.cell.engine} on {r.hardware.label}" for r, other in known if other and prompts_of(other) == prompts_of(written)}
    elsewhere = f", only {', '.join(sorted(places))}" if places else ""
    return f"the reference has not continued these prompts on this engine and machine{elsewhere}"


def _documents(results: Iterable[DocumentResult]) -> dict[str, float | None]:
    return {
        f"{name_of(result)} ({unit})": value
        for result in results
        for unit, value in (("word", result.word_perplexity), ("byte", result.byte_perplexity))
    }


def _adjusted(flips: Mapping[str, Flips]) -> dict[str, float | None]:
    """p-values of the tasks, corrected over them."""
    if not flips:
        return {}
    values: list[float] = significance.holm(significance.mcnemar(*zip(*flips.values(), strict=True))).tolist()
    return dict(zip(flips, values, strict=True))


def _reported_error(tasks: list[ZeroshotResult]) -> float | None:
    """The standard error from those that the tasks report, for tasks whose items are not known."""
    errors = [task.stderr for task in tasks if task.stderr is not None]
    return math.hypot(*errors) / len(errors) if len(errors) == len(tasks) else None


def _by_group(accuracy: Mapping[str, float], delta: Mapping[str, float]) -> tuple[dict[str, float | None], dict[str, float]]:
    """Accuracy and its change in each group of tasks; the change only where every task of the group has a partner."""
    groups: dict[str, list[str]] = {}
    known = zeroshot.groups()
    for task in accuracy:
        groups.setdefault(known.get(task, OTHER), []).append(task)
    changes = {group: fmean(delta[t] for t in tasks) for group, tasks in sorted(groups.items()) if all(t in delta for t in tasks)}
    return {group: fmean(accuracy[t] for t in tasks) for group, tasks in sorted(groups.items())}, changes


def _worst(
    shared: Sequence[tuple[ZeroshotResult, ZeroshotResult]], flips: Mapping[str, Flips]
) -> tuple[str | None, float | None, float | None, float | None]:
    """The task that changed for the worst with its change and an interval that holds for all tasks at once (Bonferroni)."""
    if not shared:
        return None, None, None, None
    ours, theirs = min(shared, key=lambda pair: (pair[0].accuracy - pair[1].accuracy, pair[0].task))
    low, high = stats.flips_interval(*flips[ours.task], len(ours.items), 1 - LEVEL / len(shared))
    return ours.task, ours.accuracy - theirs.accuracy, low, high


def _value(result: PerplexityResult) -> float:
    return attempt(stats.perplexity, result.scored, otherwise=math.nan)
