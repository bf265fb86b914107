"""Flags that no stage writes, since the facts behind them lie in several records or are plain from one of any age."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean

from slimbench.harness.schema.quality import QualityResult
from slimbench.harness.schema.record import Record
from slimbench.harness.schema.speed import SpeedPointResult
from slimbench.harness.schema.work import WorkResult
from slimbench.harness.stats import intervals as stats
from slimbench.harness.stats.bootstrap import attempt, normal_quantile
from slimbench.harness.stats.speedups import paired_speedup
from slimbench.leaderboard.rows.pairing import shared_items
from slimbench.leaderboard.rows.row import Row

_LEVEL = 0.95
_POLICIES = ("policy", "kv-cache")
"""Formats of artefacts that have one; the second is a name of earlier records."""

Place = tuple[str, str, str, str]
"""What tells a row from all others (`Row.place`)."""


def of_speed(record: Record, rival: Record | None) -> Iterator[str]:
    """What the samples of a speed record leave open, and a speed-up that the bytes do not explain.

    Args:
        rival: The speed record of the reference on the same hardware; None where there is none, and for the reference itself.
    """
    points = record.speed.points if record.speed else []
    settings = record.config.get("speed")
    target = settings.get("target") if isinstance(settings, dict) else None
    for point in points:
        place, runs = f"({point.batch}×{point.prompt}+{point.new_tokens})", len(point.candidate.decode_ms)
        if runs < stats.FEWEST_FOR_MEDIAN:
            yield f"speed of {'1 run' if runs == 1 else f'{runs} runs'}, too few for an interval {place}"
        elif isinstance(target, float) and (reached := max(filter(None, point.half_widths.values()), default=0.0)) > target:
            yield f"speed within ± {reached:.1%}, aimed at ± {target:.0%} {place}"
    if any(len(point.processes) < 2 <= len(point.candidate.decode_ms) for point in points) and record.imported is None:
        yield "speed of one process: its intervals do not hold what differs from process to process"
    if work := record.speed.work if record.speed else None:
        yield from _guessed(work)
    if points and rival and rival.speed and rival.speed.points:
        yield from _above_the_bytes(points[0], rival.speed.points[0])


def _guessed(work: WorkResult) -> Iterator[str]:
    """A draft that did nothing, or nothing that was of use, for the texts that were timed."""
    if "draft" not in work.slots or not work.text_accepted or any(work.text_accepted):
        return
    if not work.text_drafted:
        yield "no guess was taken; the engine does not show whether there were any"
    elif not sum(work.text_drafted):
        yield f"policy never guessed: no token of {len(work.text_drafted)} texts"
    else:
        yield f"none of {sum(work.text_drafted):,} guesses was taken"


def _above_the_bytes(ours: SpeedPointResult, theirs: SpeedPointResult) -> Iterator[str]:
    """A speed-up above the ratio of the bytes that a step reads: then the reference did not read as fast as it could.

    The lower bound of the speed-up decides where there is one.
    """
    moved = [point.roofline.weight_bytes + (point.roofline.cache_bytes or 0) if point.roofline else 0 for point in (ours, theirs)]
    times = (ours.candidate.decode_ms, ours.reference.decode_ms) if ours.reference else ([], [])
    speedup = attempt(partial(paired_speedup, runs=ours.processes, prompts=ours.prompt_of_pairs), *times, otherwise=None)
    if speedup is None or not all(moved):
        return
    least = speedup.low if len(times[0]) >= stats.FEWEST_FOR_MEDIAN else speedup.value
    if least > (ratio := moved[1] / moved[0]):
        yield (
            f"speed-up {speedup.value:.2f} is above the ratio of bytes that a step reads, {ratio:.2f}: "
            "the reference's products are slow here, or, where the two are close, it is chance"
        )


def of_quality(result: QualityResult) -> Iterator[str]:
    """An accuracy that guessing would give as well: chance lies within its 95 % interval, or above it."""
    tasks = result.zeroshot
    chances = [task.chance for task in tasks if task.chance is not None]
    if not tasks or len(chances) < len(tasks):
        return
    error = attempt(stats.accuracy_se, [task.correctness for task in tasks], otherwise=None)
    accuracy, chance = fmean(task.accuracy for task in tasks), fmean(chances)
    if error is not None and accuracy - normal_quantile(_LEVEL) * error <= chance:
        yield f"accuracy {accuracy:.1%} cannot be told from chance, {chance:.1%}"


def never_exercised(result: QualityResult, theirs: QualityResult | None, compress: Record | None) -> Iterator[str]:
    """Texts and tasks in which a policy did nothing, since they are no longer than what it leaves exact.

    Records of earlier versions do not say how much was exact. There answers whose log-likelihoods are all those of the reference tell it.

    Args:
        theirs: The quality of the reference, None for the reference itself.
        compress: The compression, of whose artefact it is known whether it has a policy.
    """
    if texts := [text.corpus for text in result.perplexity if text.exact_keys == 1]:
        yield f"policy never exercised by {', '.join(texts)}: the windows are no longer than what stays exact"
    if (blocks := _all_blocks(result)) and result.perplexity:
        yield f"policy never exercised by {result.perplexity[0].corpus}: each token ran all {blocks} blocks"
    if tasks := [task.task for task in result.zeroshot if task.exact_keys == 1]:
        if len(tasks) == len(result.zeroshot):
            yield "policy never exercised in any task: no prompt is longer than what stays exact"
        else:
            yield f"policy never exercised in {', '.join(tasks)}: no prompt is longer than what stays exact"
    claim = compress.compress.claim if compress and compress.compress else None
    if result.work and result.work.slots == ["draft"]:  # it leaves all log-likelihoods as they are
        return
    if claim is None or theirs is None or claim.format not in _POLICIES or any(task.exact_keys is not None for task in result.zeroshot):
        return
    pairs = shared_items(result.zeroshot, theirs.zeroshot)
    answers = [(ours.items.loglikelihoods, reference.items.loglikelihoods) for ours, reference in pairs if reference]
    if answers and len(answers) == len(pairs) and all(ours and ours == reference for ours, reference in answers):
        count = sum(len(ours) for ours, _ in answers)
        yield f"policy never exercised in any task: all {count:,} items have the log-likelihoods of the reference, to the last digit"


def _all_blocks(result: QualityResult) -> int | None:
    """The blocks of a model whose policy could leave some out, where each token that was scored ran all of them; None elsewhere."""
    scored, blocks = result.work.scored if result.work else None, result.evidence.blocks if result.evidence else None
    return blocks if scored and blocks and "depth" in (result.work.slots if result.work else ()) and scored.blocks >= blocks else None


def artefact(record: Record | None) -> str | None:
    """What artefacts of the same bytes share; None where a hash is not known."""
    files = record.compress.files if record and record.compress else []
    return " ".join(sorted(f"{file.name}={file.sha256}" for file in files)) if files and all(file.sha256 for file in files) else None


def likelihoods(result: QualityResult | None) -> tuple[float, ...]:
    """The log-likelihood of every window of the headline; none where nothing was scored."""
    return tuple(result.perplexity[0].window_nll) if result and result.perplexity else ()


def copies(board: Sequence[Row], artefacts: Mapping[Place, str | None]) -> list[Row]:
    """The rows; those whose artefact is another one's byte by byte, on one engine of one table, with a flag that names the others.

    Args:
        artefacts: Of each row by its place, as `artefact` gives it.
    """
    twins = _twins(board, artefacts)
    return [
        row.model_copy(update={"flags": [*row.flags, f"byte-identical to {', '.join(others)}: what differs between them is noise"]})
        if (others := [other.label for other in twins.get(row.place, ())])
        else row
        for row in board
    ]


def same_answers(board: Sequence[Row], artefacts: Mapping[Place, str | None], scored: Mapping[Place, tuple[float, ...]]) -> list[Row]:
    """The rows; those of other bytes that score every window to the last digit as another one on their engine, with a flag that says so.

    Args:
        artefacts: Of each row by its place, as `artefact` gives it; rows of unknown bytes are not looked at.
        scored: Of each row by its place, as `likelihoods` gives it.
    """
    twins = _twins([row for row in board if artefacts.get(row.place)], scored)
    return [
        row.model_copy(update={"flags": [*row.flags, f"scores every window as {', '.join(others)}: on this engine they compute the same"]})
        if (others := [other.label for other in twins.get(row.place, ()) if artefacts.get(other.place) != artefacts.get(row.place)])
        else row
        for row in board
    ]


def _twins(board: Sequence[Row], traits: Mapping[Place, Hashable]) -> dict[Place, list[Row]]:
    """The other rows of each row's table and engine that share its trait, where it has one."""
    alike: dict[Hashable, list[Row]] = defaultdict(list)
    for row in board:
        if trait := traits.get(row.place):
            alike[row.table_key, row.engine_label, trait].append(row)
    return {row.place: [other for other in group if other is not row] for group in alike.values() for row in group}
