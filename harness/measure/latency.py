"""Prefill and decode times over a grid of points, candidate and reference interleaved in each of several processes.

Each sample is one whole run: a prompt is processed (prefill, the time to first token) and `new_tokens` are chosen
one by one: the likeliest, or drawn at a temperature. Tokenisation is excluded; token counts are fixed. Runs of candidate and reference
alternate in the order A B B A B A A B … (Thue–Morse), so that drift of the machine, linear or bent, falls on both alike.

Repetition ends when the 95 % intervals of the medians, and that of the paired speed-up, are as narrow as asked. Looking
again and again until they are could make intervals too hopeful. Simulated here (four intervals looked at after every
second pair, at least eight pairs, log-normal noise of 1 to 10 % with and without outliers, tests/unit/measure/test_latency.py) it
does not: each covers in 95 to 99 %, since order statistics are conservative at the sizes where stopping happens. With a
first look after six pairs coverage is a point lower.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from slimbench.harness.config.schema import SpeedConfig, SpeedPoint
from slimbench.harness.measure import energy, gpu
from slimbench.harness.measure.dynamic.texts import Texts, prompts, sha256
from slimbench.harness.measure.loaded import Generates
from slimbench.harness.measure.machine import CacheFlush, MachineProbe
from slimbench.harness.measure.timer import Timer, timer
from slimbench.harness.schema.generation import TimedTokens
from slimbench.harness.schema.speed import EnergyResult, GpuState, Samples, SpeedPointResult
from slimbench.harness.stats.intervals import FEWEST_FOR_MEDIAN
from slimbench.harness.stats.speedups import middle, paired_speedup
from slimbench.harness.stats.workload import spread_within

_PROBE_EVERY = 4


class Throttled(Exception):
    """No run of a point was fit to be counted; the message is one line."""


@dataclass(frozen=True)
class Instruments:
    """What is read beside the runs on one device. Not every machine has everything.

    Attributes:
        meter: Energy counter, or None with the reason in `no_meter`.
        card: NVML of a CUDA card.
        flush: Overwrites the last-level cache, where the protocol asks for it.
    """

    timer: Timer
    probe: MachineProbe
    meter: energy.Meter | None = None
    no_meter: str | None = None
    card: gpu.Monitor | None = None
    flush: CacheFlush | None = None

    @classmethod
    def of(cls, device: torch.device, flush_cache: bool = False, cards: int = 1, reads: int = 0) -> Instruments:
        """Everything that this machine has for a device; of several cards the first is watched, and energy is not counted.

        Args:
            reads: Bytes that a decode step reads, as of `MachineProbe`.
        """
        card, meter, missing = gpu.monitor(device), None, None
        try:
            if cards > 1:
                raise energy.NotReadable("the energy of several cards is not counted")
            meter = energy.meter(device, card)
        except energy.NotReadable as error:
            missing = str(error)
        return cls(timer(device), MachineProbe(device, reads), meter, missing, card, CacheFlush(device) if flush_cache else None)


@dataclass(frozen=True)
class Run:
    """One prefill and the decode steps after it: milliseconds, milliseconds a step, joules of the steps, the card at their end.

    `tokens` are those that were chosen, int64 [batch, new_tokens] on the CPU.
    """

    prefill_ms: float
    decode_ms: float
    tokens: torch.Tensor
    joules: float | None = None
    state: GpuState | None = None


def first_call(model: Generates, point: SpeedPoint) -> float:
    """Milliseconds of a prefill and a decode step at a point that the model has not run before: compilation, autotuning, repacking."""
    clock, ids = timer(model.device), prompts(model, point)
    model.synchronize()
    start = clock.mark(model.synchronize)
    model.decode_step(model.prefill(ids, room=point.new_tokens))
    return clock.milliseconds(start, clock.mark(model.synchronize))


def measure_point(
    candidate: Generates,
    reference: Generates | None,
    point: SpeedPoint,
    config: SpeedConfig,
    instruments: Instruments,
    on_progress: Callable[[float], None],
    first_call_ms: float | None = None,
    texts: Texts | None = None,
) -> SpeedPointResult:
    """Measure one point of the grid.

    Args:
        reference: The dense model on the same engine. The candidate itself may take this role too (A/A). None measures the candidate
            alone.
        instruments: Those of the candidate's device.
        on_progress: Called with the fraction of the budget that is used.
        first_call_ms: What `first_call` gave for the candidate at this point; None if it has run here before.
        texts: Prompts that are gone on with, each by as many pairs in a row as the protocol says; None: one prompt of random ids.

    Raises:
        Throttled: The card was throttled in every pair of runs.
    """
    texts = texts or Texts({0: prompts(candidate, point)}, 1)
    models = [candidate] if reference is None else [candidate, reference]
    others = [model for model in models if model is not candidate]
    cache = _cache_halfway(candidate, point)
    for model in others:
        first_call(model, point)
    for model in [candidate, *others] * config.warmup:
        run_once(model, texts.of(0)[1], point.new_tokens, instruments)
    taken = _Taken([Samples(prefill_ms=[], decode_ms=[]) for _ in models])
    instruments.probe.restart()
    probes, stopped, began = [instruments.probe.read()], "max_repeats", time.perf_counter()
    for repeat in range(config.max_repeats):
        number, ids = texts.of(repeat)
        taken.add({i: run_once(models[i], ids, point.new_tokens, instruments) for i in order(repeat, len(models))}, number)
        elapsed = time.perf_counter() - began
        on_progress(min(1.0, elapsed / config.budget_s))
        enough = taken.pairs >= config.min_repeats and repeat + 1 >= len(texts.ids) * texts.repeats
        if repeat % 2 and enough and precise(half_widths(*taken.samples, prompts=taken.prompts(texts)), config.target):
            stopped = "target"
            break
        if elapsed > config.budget_s:
            stopped = "budget"
            break
        if repeat % _PROBE_EVERY == _PROBE_EVERY - 1:
            probes.append(instruments.probe.read())
    probes.append(instruments.probe.read())
    taken.check()
    return SpeedPointResult(
        **point.model_dump(),
        candidate=taken.samples[0],
        reference=taken.samples[1] if len(models) > 1 else None,
        first_call_ms=first_call_ms,
        probes=probes,
        half_widths=half_widths(*taken.samples, prompts=taken.prompts(texts)),
        processes=[taken.pairs],
        stopped=stopped,
        dropped=taken.dropped,
        kv_cache_bytes=cache,
        energy=_energy(instruments, taken.joules, point),
        gpu=taken.states,
        tokens=taken.tokens(),
        prompts=texts.told and texts.told.model_copy(update={"pairs": taken.numbers}),
    )


def combined(parts: Sequence[SpeedPointResult], target: float) -> SpeedPointResult:
    """One point that several processes have measured, in their order.

    Args:
        target: Of the intervals, as in `SpeedConfig`.
    """
    first, runs = parts[0], [count for part in parts for count in part.processes]
    candidate = _joined([part.candidate for part in parts])
    reference = _joined([part.reference for part in parts if part.reference]) if first.reference else None
    texts = first.prompts and first.prompts.model_copy(update={"pairs": [number for part in parts for number in part.prompt_of_pairs]})
    widths = half_widths(candidate, reference, runs=runs, prompts=texts.pairs if texts else ())
    ends = [part.stopped for part in parts]
    missed = next((end for end in ends if end != "target"), "spread")
    return first.model_copy(
        update={
            "candidate": candidate,
            "reference": reference,
            "probes": [probe for part in parts for probe in part.probes],
            "half_widths": widths,
            "processes": runs,
            "stopped": "target" if precise(widths, target) else missed,
            "dropped": sum(part.dropped for part in parts),
            "energy": _energy_of([part.energy for part in parts if part.energy]),
            "load": {name: max(part.load.get(name, 0.0) for part in parts) for part in parts for name in part.load},
            "gpu": [state for part in parts for state in part.gpu],
            "prompts": texts,
            "tokens": _tokens_of([(part.tokens, count) for part, count in zip(parts, runs, strict=True) if part.tokens]),
        }
    )


def _joined(parts: Sequence[Samples]) -> Samples:
    return Samples(
        prefill_ms=[ms for part in parts for ms in part.prefill_ms],
        decode_ms=[ms for part in parts for ms in part.decode_ms],
    )


def _energy_of(parts: Sequence[EnergyResult]) -> EnergyResult | None:
    """Joules of all tokens over their number; what could not be read once is not known."""
    unread = [part for part in parts if part.joules_per_token is None]
    if unread or not parts:
        return unread[0] if unread else None
    tokens = sum(part.tokens for part in parts)
    joules = sum((part.joules_per_token or 0.0) * part.tokens for part in parts)
    return parts[0].model_copy(update={"joules_per_token": joules / tokens, "tokens": tokens})


def _tokens_of(parts: Sequence[tuple[TimedTokens, int]]) -> TimedTokens | None:
    """The tokens of all processes, each with the number of its pairs."""
    if not parts:
        return None
    candidate, reference = Counter[str](), Counter[str]()
    for tokens, _ in parts:
        candidate.update(tokens.candidate)
        reference.update(tokens.reference)
    shares = [(tokens.equal, count) for tokens, count in parts if tokens.equal is not None]
    equal = sum(share * count for share, count in shares) / sum(count for _, count in shares) if shares else None
    return TimedTokens(candidate=candidate, reference=reference, equal=equal)


@dataclass
class _Taken:
    """What the runs of a point gave so far. Throttled runs are dropped, and with each its neighbour."""

    samples: list[Samples]
    numbers: list[int] = field(default_factory=list)
    chosen: list[Counter[str]] = field(default_factory=lambda: [Counter(), Counter()])
    equal: list[float] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)
    states: list[GpuState] = field(default_factory=list)
    dropped: int = 0

    @property
    def pairs(self) -> int:
        return len(self.samples[0].decode_ms)

    def prompts(self, texts: Texts) -> list[int]:
        """Of each pair the number of its prompt, where there are several."""
        return self.numbers if texts.told else []

    def add(self, runs: dict[int, Run], prompt: int) -> None:
        """Keep the runs of one repeat, keyed by the index of their model."""
        self.states += [run.state for run in runs.values() if run.state]
        if any(run.state and run.state.slowdowns for run in runs.values()):
            self.dropped += 1
            return
        self.numbers.append(prompt)
        for index, run in runs.items():
            self.samples[index].prefill_ms.append(run.prefill_ms)
            self.samples[index].decode_ms.append(run.decode_ms)
            self.chosen[index][sha256(run.tokens)] += 1
        if len(runs) > 1:
            self.equal.append(float((runs[0].tokens == runs[1].tokens).double().mean()))
        if runs[0].joules is not None:
            self.joules.append(runs[0].joules)

    def tokens(self) -> TimedTokens:
        equal = statistics.fmean(self.equal) if self.equal else None
        return TimedTokens(candidate=self.chosen[0], reference=self.chosen[1], equal=equal)

    def check(self) -> None:
        if not self.pairs:
            reasons = sorted({reason for state in self.states for reason in state.slowdowns})
            raise Throttled(f"the card was throttled in all {self.dropped} repeats: {', '.join(reasons)}")


def run_once(model: Generates, ids: torch.Tensor, new_tokens: int, instruments: Instruments) -> Run:
    """One run. Cache flush, energy counter and NVML are read outside the timed regions."""
    clock, meter = instruments.timer, instruments.meter
    if instruments.flush:
        instruments.flush()
    model.synchronize()
    began = clock.mark(model.synchronize)
    step = model.prefill(ids, room=new_tokens)
    first, chosen = clock.mark(model.synchronize), [step.token]
    model.synchronize()
    before = meter.snapshot() if meter else None
    start = clock.mark(model.synchronize)
    for _ in range(new_tokens - 1):
        step = model.decode_step(step)
        chosen.append(step.token)
    end = clock.mark(model.synchronize)
    state = instruments.card.sample() if instruments.card else None
    model.synchronize()
    joules = meter.joules(before, meter.snapshot()) if meter else None
    tokens = torch.cat(chosen, 1).cpu()
    return Run(clock.milliseconds(began, first), clock.milliseconds(start, end) / (new_tokens - 1), tokens, joules, state)


def order(repeat: int, models: int) -> list[int]:
    """Which model runs first in a repeat: A B, B A, B A, A B, … (Thue–Morse), so that also those after a probe are balanced."""
    return list(range(models))[:: -1 if repeat.bit_count() % 2 else 1]


def half_widths(
    candidate: Samples, reference: Samples | None = None, *, runs: Sequence[int] = (), prompts: Sequence[int] = ()
) -> dict[str, float | None]:
    """How precise the medians of a point are: the larger distance of a bound of the 95 % interval, relative to the median.

    Args:
        runs: How many pairs each process has; empty for one process.
        prompts: Of each pair the number of its prompt; empty where all have the same.

    Returns:
        `decode` and `prefill` of the candidate and, with a reference, `reference_decode` and the paired `speedup`; None for fewer
        than six samples. Where prompts differ, `repeats` alone: what repeats of the same prompts say of the speed-up (`spread_within`).
    """
    if len(prompts):
        return {"repeats": spread_within(candidate.decode_ms, reference.decode_ms, prompts)} if reference else {"repeats": None}
    found = {"decode": _spread(candidate.decode_ms, runs), "prefill": _spread(candidate.prefill_ms, runs)}
    if reference:
        found["reference_decode"] = _spread(reference.decode_ms, runs)
        enough = len(reference.decode_ms) >= FEWEST_FOR_MEDIAN
        times = candidate.decode_ms, reference.decode_ms
        found["speedup"] = _relative(*paired_speedup(*times, runs=runs)) if enough else None
    return found


def precise(widths: dict[str, float | None], target: float) -> bool:
    """Whether every interval is known and within the target."""
    return all(width is not None and width <= target for width in widths.values())


def _spread(samples: list[float], runs: Sequence[int]) -> float | None:
    return _relative(*middle(samples, runs)) if len(samples) >= FEWEST_FOR_MEDIAN else None


def _relative(middle: float, low: float, high: float) -> float | None:
    """None where there are no bounds."""
    width = max(high - middle, middle - low) / middle
    return width if math.isfinite(width) else None


def _cache_halfway(model: Generates, point: SpeedPoint) -> int | None:
    step = model.prefill(prompts(model, point), room=point.new_tokens)
    for _ in range(point.new_tokens // 2):
        step = model.decode_step(step)
    return model.cache_bytes(step.state)


def _energy(instruments: Instruments, joules: list[float], point: SpeedPoint) -> EnergyResult:
    if instruments.meter is None:
        return EnergyResult(reason=instruments.no_meter)
    tokens = len(joules) * point.batch * (point.new_tokens - 1)
    if sum(joules) <= 0:
        return EnergyResult(source=instruments.meter.source, reason="the counter did not move during the decode steps")
    return EnergyResult(joules_per_token=sum(joules) / tokens, tokens=tokens, source=instruments.meter.source)
