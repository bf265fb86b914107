"""The stage `quality`: perplexity, divergence from the reference, zero-shot accuracy, continuations, retrieval of an artefact from disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from slimbench.harness.config.parse import build_method
from slimbench.harness.config.schema import RunConfig, SuiteConfig
from slimbench.harness.config.sections.suite import RECOMPUTED
from slimbench.harness.config.sections.teaching import recipe
from slimbench.harness.measure import claims, documents, generation, perplexity, zeroshot
from slimbench.harness.measure.answers import imitation
from slimbench.harness.measure.dynamic import causality, retrieval, scored, work
from slimbench.harness.measure.dynamic.readings import Readings
from slimbench.harness.measure.loaded import Branches, Generates, Loaded, Scores
from slimbench.harness.schema.quality import QualityResult
from slimbench.harness.schema.work import WorkResult
from slimbench.harness.stages import models, readings, teaching
from slimbench.harness.stages.common import Reporter, calibration_of, evidence_of, load, tokenizer_of
from slimbench.harness.stages.distributions import Distributions
from slimbench.harness.stats.bootstrap import UNKNOWN, attempt
from slimbench.harness.stats.intervals import perplexity_ratio_interval
from slimbench.harness.store import artefact
from slimbench.harness.store.partial import Journal, Part
from slimbench.methods.base import Unsupported
from slimbench.tasks import prompts
from slimbench.tasks.overlap import overlap
from slimbench.tasks.teaching import data_set

_WORK_TEXTS, _WORK_TOKENS = 8, 2048
_GAP, _STEPS, _FEW, _MORE = 0.005, 1024, 2, 16
_OVERLAP = 0.001  # fraction of the test n-grams from which on the text counts as shared


@dataclass(frozen=True)
class _Sheet:
    """What parts of a measurement write on.

    Attributes:
        result: So far.
        report: Shows which part is under way.
        journal: Keeps what each part measured, and has what earlier attempts did.
    """

    result: QualityResult
    report: Reporter
    journal: Journal

    @contextmanager
    def part(self, name: str, unit: str) -> Iterator[Part]:
        """Report a part as a phase, and keep its wall time, in earlier attempts too."""
        name = perplexity.public_name(name)
        self.report.phase(name)
        began = time.perf_counter()
        kept = self.journal.part(name, unit)
        yield kept
        self.result.seconds[name] = time.perf_counter() - began + kept.seconds


def run(config: RunConfig, key: str, reference_key: str | None, report: Reporter, journal: Journal | None = None) -> QualityResult:
    """Measure an artefact under every protocol of the suite.

    Args:
        key: Compress key of the artefact.
        reference_key: That of the reference; None where the reference did not run.
        journal: Keeps what is scored, and has what earlier attempts scored.

    Raises:
        harness.measure.perplexity.Diverged: The artefact is worse than chance.
        methods.base.Unsupported: The engine does not score tokens, and the suite has texts or tasks.
    """
    suite, journal = config.suite, journal or Journal()
    source = models.prepare(config.model, report.phase)
    tokenizer = tokenizer_of(source, config)
    others = ("document",) if key == reference_key else ("document", RECOMPUTED)
    windows = [perplexity.Windows(tokenizer, wanted, suite) for wanted in suite.passes() if wanted.protocol not in others]
    asked = suite.retrieval
    contexts = [retrieval.Contexts(tokenizer, asked, length, suite.add_bos) for length in asked.lengths] if asked else []
    distributions = Distributions(config, key, reference_key, report, journal)
    distributions.prepare(windows)
    loaded, load_seconds = load(config, key, report)
    result = QualityResult(evidence=evidence_of(loaded, config, key), load_seconds=load_seconds, forward_tokens=0)
    sheet = _Sheet(result, report, journal)
    calibration = calibration_of(config, source, report, writes=False)
    if calibration is None and any(build_method(step).needs.calibration for step in config.pipeline):
        result.flags.append("calibration text not held against the test text: it is not in this machine's cache")
    texts = _texts(config)
    taught = _taught_text(texts, tokenizer)
    seen = [*(calibration.ids.numpy() if calibration else ()), *taught] or None
    ran: scored.CountingPart | None = None
    for part in windows:
        model, name = Scores.of(loaded), f"{part.wanted.corpus} {part.wanted.protocol} {part.wanted.seqlen}"
        with sheet.part(name, "windows") as kept:
            counting = None if result.perplexity else scored.counting(loaded, kept)
            measured = distributions.measure(model, part, counting or kept)
        ran = ran or counting
        if not result.perplexity and measured.perplexity > model.vocab_size:
            raise perplexity.Diverged(
                f"perplexity {measured.perplexity:.3g} exceeds the vocabulary size {model.vocab_size}: worse than chance"
            )
        measured.calibration_overlap = None if seen is None else overlap(part.ids.numpy(), seen)
        measured.exact_keys = model.exact_share([(part.first - 1, part.ids.shape[1] - 1)], part.prompt)
        result.perplexity.append(measured)
        result.flags += _stretch_flags(part, model)
        result.forward_tokens += part.tokens
    if loaded.slots and windows:
        _count_work(sheet, config, key, loaded, windows[0].ids, windows[0], ran)
        result.flags += _causal_flags(sheet, Scores.of(loaded), windows[0].ids)
    elif loaded.slots and contexts:
        _count_work(sheet, config, key, loaded, torch.cat([contexts[0].ids(context) for context in contexts[0].contexts]))
    if suite.noise_windows and distributions.is_reference and windows:
        with sheet.part("noise", "comparisons") as kept:
            result.perplexity[0].noise = distributions.noise(Scores.of(loaded), windows[0], kept)
    for wanted in (p for p in suite.passes() if p.protocol == "document"):
        with sheet.part(f"{wanted.corpus} document", "windows of documents") as kept:
            document, tokens = documents.measure(Scores.of(loaded), tokenizer, wanted, suite.batch_tokens, report.progress, kept)
        result.documents.append(document)
        result.forward_tokens += tokens
    if suite.tasks:
        with sheet.part("zero-shot", "answers") as kept:
            result.zeroshot, tokens = zeroshot.measure(Scores.of(loaded), tokenizer, suite, report.progress, seen, kept)
        result.forward_tokens += tokens
    if suite.continuations:
        _continue(sheet, loaded, tokenizer, suite, distributions.is_reference)
    if contexts:
        _retrieve(sheet, loaded, contexts, readings.of(config, key), seen)
    _imitate(sheet, texts, loaded, tokenizer)
    result.flags += [*_flags(result, distributions, bool(taught)), *journal.remarks()]
    return result


def _texts(config: RunConfig) -> list[tuple[str, data_set.Made | None]]:
    """The recipe of each step that learns from a teacher's text, and that text; None where it is not in this machine's cache."""
    names = [method.recipe for method in (build_method(step) for step in config.pipeline) if method.needs.text]
    return [(name, data_set.found(teaching.key(config, name))) for name in names]


def _taught_text(texts: list[tuple[str, data_set.Made | None]], tokenizer: Any) -> list[Any]:
    """Token ids of each prompt and each response that was learned from."""
    examples = [example for _, made in texts if made for example in data_set.examples_of(made)[0]]
    lines = [line for example in examples for line in (example.prompt, example.response)]
    return [np.array(tokenizer.encode(line, add_special_tokens=False), dtype=np.int64) for line in lines]


def _count_work(
    sheet: _Sheet,
    config: RunConfig,
    key: str,
    loaded: Loaded,
    ids: torch.Tensor,
    part: perplexity.Windows | None = None,
    ran: scored.CountingPart | None = None,
) -> None:
    """Count what runs for a token under a policy, behind parts of some texts, and score some token by token; or say why not.

    Args:
        ids: Token ids of the texts, int64 [N, T].
        part: The windows that they are, where they were scored.
        ran: What ran while the windows were scored; None where that was not counted.
    """
    result = sheet.result
    length = min(ids.shape[1], loaded.max_length - work.NEW_TOKENS, _WORK_TOKENS)
    texts = ids.unfold(1, length, length).flatten(0, 1)[:_WORK_TEXTS]
    claim = artefact.read_manifest(artefact.location(key)).claim.work
    try:
        with sheet.part("work", "texts") as kept:
            model = Generates.of(loaded)
            found = kept.once(
                texts.numpy().tobytes(), len(texts), lambda: work.measure(model, texts, claim, sheet.report.progress).model_dump()
            )
        stepped, whole = list[float](), result.perplexity[0].window_nll if part else []
        if part and _is_scored_otherwise(loaded, part):
            with sheet.part("token by token", "windows") as kept:
                stepped = _one_by_one(Scores.of(loaded), part, whole, kept, sheet.report.progress)
        result.work = WorkResult(**found | {"stepwise_gap": _gap(stepped, whole) if stepped else None, "stepwise_nll": stepped})
        if ran:
            result.work.scored, told = ran.result()
            result.work.flags += told
        if stepped and abs(gap := _gap(stepped, whole)) > _GAP:
            _, low, high = attempt(perplexity_ratio_interval, stepped, whole[: len(stepped)], otherwise=UNKNOWN)
            count, bounds = len(stepped), f"{low - 1:+.1%} to {high - 1:+.1%}"
            result.work.flags.append(f"perplexity token by token differs by {gap:+.1%} over {count} windows ({bounds})")
        if result.evidence:
            claims.measured(result.evidence, result.work, claim)
        twice = 2 if result.work.equal is not None else 1
        result.forward_tokens += twice * len(texts) * (texts.shape[1] + work.NEW_TOKENS - 1)
    except Unsupported as error:
        result.flags.append(f"work not counted: {error}")


def _is_scored_otherwise(model: Loaded, part: perplexity.Windows) -> bool:
    """Whether windows could be scored token by token and were not; not where they are long, or drafts leave logits alone."""
    if not isinstance(model, Scores) or model.scoring == "step" or part.labels > _STEPS or part.wanted.protocol == "stream":
        return False
    return set(model.slots) != {"draft"}


def _one_by_one(model: Scores, part: perplexity.Windows, nll: list[float], kept: Part, progress: Callable[[int, int], None]) -> list[float]:
    """Mean -log p of the first windows token by token: of few, and of more where these differ, as rounding may turn what a policy decides.

    Args:
        nll: Of the windows as they were scored.
        kept: Keeps what each few windows gave.
    """
    found = list[float]()
    for count in (_FEW, _MORE):
        while len(more := part.ids[len(found) : min(count, len(found) + model.batch(_FEW))]):
            found += kept.once([len(found), len(more)], len(more), partial(part.stepwise, model, more))
            progress(len(found), count)
        if abs(_gap(found, nll)) <= _GAP:
            break
    return found


def _gap(stepped: list[float], nll: list[float]) -> float:
    """How much perplexity the first windows have more token by token."""
    return math.expm1((sum(stepped) - sum(nll[: len(stepped)])) / len(stepped))


def _continue(sheet: _Sheet, loaded: Loaded, tokenizer: Any, suite: SuiteConfig, is_reference: bool) -> None:
    """Let the model go on from prompts; where it cannot, say why, or raise `Unsupported` if the suite asks for nothing else."""
    try:
        model = Generates.of(loaded)
        with sheet.part("continuations", "continuations") as kept:
            sheet.result.generation, tokens = generation.measure(
                model, tokenizer, prompts.load(), suite, sheet.report.progress, kept, ties=is_reference
            )
        sheet.result.forward_tokens += tokens
        sheet.result.flags += filter(None, [generation.unguessed(sheet.result.generation)])
    except Unsupported as error:
        if not suite.texts and not suite.tasks:
            raise
        sheet.result.flags.append(f"no continuations: {error}")


def _retrieve(sheet: _Sheet, loaded: Loaded, asked: list[retrieval.Contexts], read: Readings, seen: Any) -> None:
    """Ask for facts behind contexts of each length; where that cannot be, say why.

    Args:
        read: Contexts that went through the same base before.
        seen: Tokens that the cell was calibrated with or taught, which none of the contexts should share; None without any.
    """
    result = sheet.result
    for contexts in asked:
        try:
            model = Branches.of(loaded)
            with sheet.part(f"retrieval {contexts.length}", "contexts") as kept:
                found, tokens = retrieval.measure(model, contexts, sheet.report.progress, kept, read)
        except Unsupported as error:
            result.flags = list(dict.fromkeys([*result.flags, f"no retrieval: {error}"]))
            continue
        found.calibration_overlap = None if seen is None else overlap([np.array(context.ids) for context in contexts.contexts], seen)
        result.retrieval.append(found)
        result.forward_tokens += tokens


def _imitate(sheet: _Sheet, texts: list[tuple[str, data_set.Made | None]], loaded: Loaded, tokenizer: Any) -> None:
    """Hold a model against the teacher whose text it learned from first; where that cannot be, say why."""
    if not texts:
        return
    name, made = texts[0]
    if made is None:
        sheet.result.flags.append(f"not held against its teacher: the text of {name} is not in this machine's cache")
        return
    try:
        with sheet.part("imitation", "examples") as kept:
            held_out = data_set.examples_of(made)[1]
            asked, report = recipe(name), sheet.report.progress
            sheet.result.imitation, tokens = imitation.measure(loaded, tokenizer, held_out, asked, made.sha256, report, kept)
        sheet.result.forward_tokens += tokens
    except Unsupported as error:
        sheet.result.flags.append(f"not held against its teacher: {error}")


def _causal_flags(sheet: _Sheet, model: Scores, ids: Any) -> list[str]:
    """A line where a policy lets tokens know later ones."""
    texts = causality.texts(model, ids)
    if texts is None or set(model.slots) == {"draft"}:
        return []
    with sheet.part("causality", "windows") as kept:
        found = kept.once(b"gains" + texts.numpy().tobytes(), len(texts), lambda: asdict(causality.look(model, texts)))
    return causality.Seen(**found).flags()


def _stretch_flags(part: perplexity.Windows, model: Scores) -> list[str]:
    """A line where stretches are scored at positions that the model was not made for, and no policy keeps them small."""
    fitting = part.within(model)
    if fitting is None or (model.reach or part.wanted.seqlen) <= model.max_length:
        return []
    return [
        f"{part.count - fitting} of {part.count} stretches lie beyond the {model.max_length:,} positions that the model was made for; "
        "perplexity and divergence are of the others"
    ]


def _flags(result: QualityResult, distributions: Distributions, taught: bool) -> list[str]:
    fractions = [(p.corpus, p.calibration_overlap) for p in result.perplexity] + [(t.task, t.calibration_overlap) for t in result.zeroshot]
    fractions += [(r.corpus, r.calibration_overlap) for r in result.retrieval]
    shared = [f"{fraction:.1%} of {name}" for name, fraction in fractions if fraction and fraction > _OVERLAP]
    where = ", ".join(dict.fromkeys(shared))
    told = f"calibration or taught text inside the test text: {where}" if taught else f"calibration text inside the test text: {where}"
    return ([told] if shared else []) + (["no divergence: the reference did not run here"] if distributions.missing else [])
