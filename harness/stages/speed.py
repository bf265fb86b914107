"""The stage `speed`: prefill, decode, energy and memory of an artefact, interleaved with the reference on the same engine."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from slimbench.harness.config.schema import RunConfig, SpeedConfig, SpeedPoint
from slimbench.harness.measure import capacity, claims, gpu, latency, machine, memory, perplexity, soundness
from slimbench.harness.measure.dynamic import passes, texts, work
from slimbench.harness.measure.hardware import available_memory
from slimbench.harness.measure.ledger.measured import ledgers
from slimbench.harness.measure.loaded import Draws, Generates
from slimbench.harness.measure.timer import timer
from slimbench.harness.schema.ledger import Ledger
from slimbench.harness.schema.speed import LargestBatch, MemoryResult, SpeedPointResult, SpeedResult
from slimbench.harness.schema.work import WorkResult
from slimbench.harness.stages import models
from slimbench.harness.stages.common import Again, Reporter, evidence_of, load, tokenizer_of
from slimbench.harness.store import artefact
from slimbench.harness.store.partial import Journal
from slimbench.methods.base import Unsupported

_BY_TEXT = {"depth", "experts", "draft", "route"}
"""Slots of policies that do more or less from text to text."""
_COUNTED = _BY_TEXT | {"attention"}
"""Slots of policies under which a token runs or reads less than there is."""


def run(config: RunConfig, key: str, reference_key: str | None, report: Reporter, journal: Journal | None = None) -> SpeedResult:
    """Measure prefill, decode, energy and memory of an artefact, interleaved with the reference on the same engine.

    The reference is interleaved with itself (A/A): what differs then is the machine. Several processes measure in turn: each of them
    its share of every point, until the last one puts together what all of them have got.

    Args:
        key: Compress key of the artefact.
        reference_key: That of the reference; None where the reference did not run.
        journal: Keeps the points that are measured, each in one process from its first run to its last, and has those of earlier attempts.

    Raises:
        Again: The next process is to measure its share.
        methods.base.Unsupported: The engine does not generate, or its policy does not run the batch of the headline.
    """
    protocol, is_reference, journal = config.speed, key == reference_key, journal or Journal()
    figure, point_of = journal.part("before the points", "other figures").once, journal.part("points", "points").once

    def told(index: int, milliseconds: float) -> float:
        """Every process makes its first calls, so that no run is one; those of the first process are told."""
        first: float = figure(["first call", index], 1, lambda: milliseconds)
        return first

    model = _loaded(config, key, report)
    grid = _grid(protocol.grid, model)
    report.phase("first call")
    loaded_bits = model.loaded_bits()
    first = latency.first_call(model, grid[0])
    first_calls = [told(0, first)]
    found = evidence_of(model, config, key, loaded_bits)
    report.phase("memory")
    cards, weights = _monitors(model), found.weight_bytes
    split = MemoryResult(**figure(["memory"], 1, lambda: memory.measure(model, grid[0], weights, cards).model_dump()))
    largest = None
    if protocol.largest_batch:
        largest = LargestBatch(**figure(["largest batch"], 1, lambda: _largest_batch(model, config, report).model_dump()))
    report.phase("first calls")
    first_calls += [told(index, latency.first_call(model, point)) for index, point in enumerate(grid[1:], start=1)]
    reference = model if is_reference else _loaded(config, reference_key, report, "load reference") if reference_key else None
    instruments = latency.Instruments.of(model.device, protocol.flush_cache, len(model.devices), soundness.weights_read(found))
    result = SpeedResult(
        points=[], memory=split, evidence=found, copy_bandwidth_gbs=0.0, largest_batch=largest, temperature=protocol.temperature
    )
    result.build = model.build()
    processes = protocol.processes if journal.folder else 1
    share = _share_of(protocol, processes)

    tokens = _tokens(config, report) if protocol.prompts else None

    def measure(process: int, index: int) -> dict[str, Any]:
        asked = None
        if protocol.prompts and tokens is not None:
            asked = texts.drawn(tokens, grid[index], protocol.prompts, process, processes)
        place, watch = process * len(grid) + index, machine.LoadWatch(instruments.card)
        progress = _Share(report.progress, place, processes * len(grid))
        measured = latency.measure_point(model, reference, grid[index], share, instruments, progress, first_calls[index], asked)
        measured.load, seen = watch.read()
        other, rows = None if is_reference else reference, [] if index else protocol.rows
        taken = passes.time_passes(model, other, point, rows, timer(model.device)) if rows else {}
        return {"point": measured.model_dump(), "disturbances": seen, "passes": taken}

    shares: list[list[dict[str, Any]]] = [[] for _ in grid]
    for process in range(min(journal.processes + 1, processes)):
        for index, point in enumerate(grid):
            turn = f", process {process + 1} of {processes}" if processes > 1 else ""
            report.phase(f"speed {point.batch}×{point.prompt}+{point.new_tokens}{turn}")
            shares[index].append(point_of([process, index, point.model_dump()], 1, partial(measure, process, index)))
    if len(shares[0]) < processes and journal.end_process():
        raise Again
    disturbances = [list(dict.fromkeys(text for part in point for text in part["disturbances"])) for point in shares]
    result.points += [latency.combined([SpeedPointResult(**part["point"]) for part in point], protocol.target) for point in shares]
    passes.tell(result, [part["passes"] for part in shares[0]])
    by_text, counted_alone = (bool(slots & set(model.slots)) for slots in (_BY_TEXT, _COUNTED))
    if tokens is not None or counted_alone:
        timed = sorted(set(result.points[0].prompt_of_pairs))
        asked = texts.prompts(model, grid[0]) if tokens is None else _asked(config, tokens, grid[0], timed)
        counted = figure(["work", timed], 1, lambda: _work(model, key, asked, grid[0], report).model_dump())
        result.work = WorkResult(**counted)
        claims.measured(found, result.work, artefact.read_manifest(artefact.location(key)).claim.work)
    if protocol.ledger:
        report.phase("ledger")
        of_both = figure(["ledgers", protocol.ledger], 1, lambda: _ledgers(model, None if is_reference else reference, protocol, grid[0]))
        result.ledgers, result.reference_ledgers = ([Ledger(**each) for each in of_both[role]] for role in ("candidate", "reference"))
    soundness.judge(result, disturbances, machine.last_level_cache(model.device), is_reference, counted_alone)
    result.flags += [*texts.untimed(result.points), *texts.unexercised(result.points, model)]
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive":
        result.flags.append("OMP_WAIT_POLICY=PASSIVE: threads sleep between parallel regions, and small products wait for them")
    beyond = [point for point in protocol.grid if point not in grid]
    limit = f"the policy runs at most {model.max_batch} at once"
    result.flags += [f"unsupported: {point.batch}×{point.prompt}+{point.new_tokens}, {limit}" for point in beyond]
    if by_text and not protocol.prompts:
        result.flags.append("random prompts: what the policy does depends on the text; speed=policy has texts")
    if reference is None:
        result.flags.append("no speed-up: the reference did not run here")
    result.flags += [f"{remark}; its points are of several processes" for remark in journal.remarks()]
    return result


def _ledgers(model: Generates, reference: Generates | None, protocol: SpeedConfig, point: SpeedPoint) -> dict[str, list[Any]]:
    """Of both, in the same turns."""
    found = ledgers([model, *([reference] if reference else [])], point, protocol.ledger or 0)
    candidate, theirs = ([ledger.model_dump() for ledger in each] for each in (*found, [])[:2])
    return {"candidate": candidate, "reference": theirs}


def _tokens(config: RunConfig, report: Reporter) -> Any:
    """The text from which prompts are drawn, as token ids."""
    report.phase("prompts")
    assert config.speed.prompts
    return perplexity.token_stream(config.speed.prompts.corpus, tokenizer_of(models.prepare(config.model, report.phase), config))[0]


def _asked(config: RunConfig, tokens: Any, point: SpeedPoint, timed: Sequence[int]) -> torch.Tensor:
    """Those prompts of the headline that were timed: others would have other work.

    Args:
        tokens: The text from which prompts are drawn.
        timed: Numbers of the prompts.
    """
    assert config.speed.prompts
    drawn = texts.drawn(tokens, point, config.speed.prompts).ids
    return torch.cat([drawn[number] for number in timed])


def _work(model: Generates, key: str, asked: torch.Tensor, point: SpeedPoint, report: Reporter) -> WorkResult:
    """What runs for the tokens behind the headline's prompts."""
    report.phase("work")
    claim = artefact.read_manifest(artefact.location(key)).claim.work
    try:
        return work.measure(model, asked, claim, report.progress, point.new_tokens)
    except Unsupported as error:
        return WorkResult(tokens=0, prompts=len(asked), flags=[f"work not counted: {error}"])


def _share_of(protocol: SpeedConfig, processes: int) -> SpeedConfig:
    """What each of so many processes is to do."""
    least, most = (max(2, math.ceil(repeats / processes)) for repeats in (protocol.min_repeats, protocol.max_repeats))
    return protocol.model_copy(update={"min_repeats": least, "max_repeats": most, "budget_s": protocol.budget_s / processes})


def _grid(grid: list[SpeedPoint], model: Generates) -> list[SpeedPoint]:
    """The points whose batch runs at once; the headline must be one of them."""
    able = [point for point in grid if model.batch(point.batch) == point.batch]
    if grid[0] not in able:
        raise Unsupported(f"the policy runs at most {model.max_batch} sequences at once, the headline has {grid[0].batch}")
    return able


def _loaded(config: RunConfig, key: str, report: Reporter, phase: str = "load artefact") -> Generates:
    model = load(config, key, report, phase)[0]
    if config.speed.temperature is None:
        return Generates.of(model)
    drawing = Draws.of(model)
    drawing.draw(config.speed.temperature)
    return drawing


def _largest_batch(model: Generates, config: RunConfig, report: Reporter) -> LargestBatch:
    report.phase("largest batch")
    protocol, limit = config.speed, config.limits.memory_gb
    memory_bytes = int(limit * 1e9) if limit else available_memory()
    return capacity.largest_batch(model, protocol.grid[0], model.batch(protocol.largest_batch or 1), memory_bytes, protocol.budget_s)


def _monitors(model: Generates) -> list[gpu.Monitor]:
    return [card for device in model.devices if (card := gpu.monitor(device))]


class _Share:
    """The progress of one of several equal parts as progress of the whole."""

    def __init__(self, report: Callable[[float, float], None], index: int, parts: int) -> None:
        self.report, self.index, self.parts = report, index, parts

    def __call__(self, fraction: float) -> None:
        self.report(self.index + fraction, self.parts)
