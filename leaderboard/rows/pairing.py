"""What may be paired: results on the same windows, documents or items. Nothing else is ever subtracted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from slimbench.harness.schema.generation import GenerationResult
from slimbench.harness.schema.quality import DocumentResult, PerplexityResult, QualityResult, ZeroshotResult
from slimbench.harness.schema.retrieval import RetrievalResult
from slimbench.harness.stats.fidelity import Apart, apart

T = TypeVar("T")


def windows_of(result: PerplexityResult) -> tuple[Any, ...]:
    """What identifies the windows of a result and how they were scored."""
    return result.protocol, result.corpus_sha256, result.seqlen, result.labels_per_window, len(result.scored)


def documents_of(result: DocumentResult) -> tuple[Any, ...]:
    """What identifies the documents of a result and how they were scored."""
    return result.protocol, result.corpus_sha256, tuple(result.words), tuple(result.bytes)


def items_of(result: ZeroshotResult) -> tuple[Any, ...]:
    """What identifies the items of a task and how they were asked."""
    return result.task, result.version, result.metric, result.num_fewshot, result.asked


def prompts_of(result: GenerationResult) -> tuple[Any, ...]:
    """What identifies the prompts of a result and how they were continued."""
    return result.protocol, result.asked.sha256, result.length


def facts_of(result: RetrievalResult) -> tuple[Any, ...]:
    """What identifies the facts of a result and how they were asked for."""
    return result.protocol, result.corpus_sha256, result.length, result.items_sha256, tuple(result.context)


def partners(ours: Sequence[T], theirs: Sequence[T], identity: Callable[[T], Any]) -> list[tuple[T, T | None]]:
    """Each of our results with the one of theirs that has the same identity, or None."""
    known = {identity(result): result for result in reversed(theirs)}
    return [(result, known.get(identity(result))) for result in ours]


def shared_items(ours: Sequence[ZeroshotResult], theirs: Sequence[ZeroshotResult]) -> list[tuple[ZeroshotResult, ZeroshotResult | None]]:
    """Each of our tasks with theirs on the same items, or None; a task whose items are not known has no partner."""
    return partners(ours, [task for task in theirs if task.items], items_of)


def paired_windows(ours: QualityResult, theirs: QualityResult | None) -> tuple[Sequence[float], Sequence[float]] | None:
    """The NLL of the windows of the first text in both; None where they do not share it."""
    if theirs is None or not ours.perplexity:
        return None
    first, partner = partners(ours.perplexity[:1], theirs.perplexity, windows_of)[0]
    return (first.scored, partner.scored) if partner else None


def paired_answers(ours: QualityResult, theirs: QualityResult | None) -> tuple[list[Sequence[float]], list[Sequence[float]]] | None:
    """The correctness of the items of each task in both; None where there is no task, or they do not share every one."""
    pairs = shared_items(ours.zeroshot, theirs.zeroshot) if theirs else []
    known = [(task.correctness, partner.correctness) for task, partner in pairs if partner]
    return ([a for a, _ in known], [b for _, b in known]) if known and len(known) == len(ours.zeroshot) else None


def name_of(result: PerplexityResult | DocumentResult) -> str:
    """Corpus and protocol for people: `bigbench-wikipedia window 512`, `bigbench-wikipedia document`."""
    protocol = result.protocol.partition("-")[0]
    return f"{result.corpus} {protocol}" + (f" {result.seqlen}" if isinstance(result, PerplexityResult) else "")


def paired_continuations(ours: QualityResult, theirs: QualityResult | None) -> list[tuple[str, Apart]]:
    """Kind of each prompt, and how far our continuation goes with theirs; empty where both have not continued the same prompts."""
    mine, other = ours.generation, theirs.generation if theirs else None
    if mine is None or other is None or prompts_of(mine) != prompts_of(other):
        return []
    written = zip(mine.asked.kinds, mine.tokens, other.tokens, strict=True)
    return [(kind, apart(a, b)) for kind, a, b in written]
