"""The ledgers of a loaded model: steps that are recorded, in turns with steps that are not, and the products of a step by themselves."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, get_args

import torch

from slimbench.harness.config.schema import SpeedPoint
from slimbench.harness.measure.dynamic.texts import prompts
from slimbench.harness.measure.evidence import bytes_of
from slimbench.harness.measure.ledger.parts import Layers, Place, is_fused, places_of, sums
from slimbench.harness.measure.ledger.products import Products, dtype_of
from slimbench.harness.measure.ledger.recorded import OtherPieces, outline, record, recording
from slimbench.harness.measure.loaded import Generates, Step
from slimbench.harness.schema.ledger import Ledger, LedgerPart, Phase
from slimbench.harness.stats.intervals import mean_interval

_WARM, _PLAIN, _RECORDED, _LEAST_TURNS = 4, 4, 3, 4
"""Steps of a turn that nobody times, that nobody records, and that are recorded; turns at least."""
_ROOM = 1 + _WARM + _PLAIN
"""Tokens of a text at least: a turn has no prompt in it."""
_TIMES = 6
_WAKINGS = 200
_GAP = 2e-5
"""Seconds between two regions, about as in a step."""
_GRAIN = 1 << 17
"""Numbers that torch shares out among threads, and that lie in their caches."""
_PYTHON = Place("python")


def ledgers(model: Generates, point: SpeedPoint, turns: int, phases: Sequence[Phase] = get_args(Phase)) -> list[Ledger]:
    """Of a decode step and of a prefill; of a decode step's time alone where the engine shows no more.

    Args:
        turns: Steps of each that are recorded.
        phases: Of which.
    """
    if reason := _unseen(model):
        return [_blank(model, point, turns, reason)]
    with torch.inference_mode():
        ids = prompts(model, point)
        decoding = _Decoding(model, ids, max(_ROOM, point.new_tokens))
        own = recording(decoding.next)
        prefill = _Prefill(model, ids, point.new_tokens)
        kinds: dict[Phase, tuple[_Decoding | _Prefill, int]] = {"decode": (decoding, point.batch), "prefill": (prefill, ids.numel())}
        return [_ledger(model, *kinds[phase], point.batch, turns, own) for phase in phases]


def _unseen(model: Generates) -> str | None:
    if getattr(model, "module", None) is None:
        return "the engine does not show what runs in a step"
    if model.device.type != "cpu":
        return "steps of a card are not recorded yet"
    if model.slots:
        return "a policy decides what runs in a step"
    return None


class _Prefill:
    """The prompt goes through the model."""

    phase: ClassVar[Phase] = "prefill"

    def __init__(self, model: Generates, ids: torch.Tensor, room: int) -> None:
        self._model, self._ids, self._room = model, ids, room

    def ready(self, steps: int) -> None:
        """Nothing to do."""

    def __call__(self) -> None:
        self._model.prefill(self._ids, room=self._room)


class _Decoding:
    """A step after the other, of the shapes that are timed; a new text is begun where one is at its end."""

    phase: ClassVar[Phase] = "decode"

    def __init__(self, model: Generates, ids: torch.Tensor, room: int) -> None:
        self._model, self._ids, self._room, self._left = model, ids, room, 0
        self._step: Step | None = None

    def ready(self, steps: int) -> None:
        """Make room for so many steps."""
        if self._left < steps:
            self._step, self._left = self._model.prefill(self._ids, room=self._room), self._room - 1

    def next(self) -> None:
        """A step, in a new text where there is no room for one."""
        self.ready(1)
        self()

    def __call__(self) -> None:
        assert self._step is not None
        self._step, self._left = self._model.decode_step(self._step), self._left - 1


def _ledger(model: Generates, step: _Decoding | _Prefill, tokens: int, heads: int, turns: int, own: float) -> Ledger:
    """The parts of one kind of step.

    Args:
        tokens: That go through it.
        heads: Rows that the head multiplies.
        own: Milliseconds that the recording of an operator takes.
    """
    module = getattr(model, "module")  # noqa: B009
    layers = Layers.of(module)
    step.ready(3)
    step()  # what is compiled is compiled before anything is hooked onto layers
    pieces = outline(step, layers.named)
    joins = any(map(is_fused, pieces))
    layers = Layers.of(module, joins)
    places = places_of(pieces, layers, tokens)
    plain, parts = list[float](), defaultdict[Place, list[float]](list)
    for _ in range(max(_LEAST_TURNS, turns // _RECORDED)):
        step.ready(_WARM + _PLAIN)
        for _ in range(_WARM):
            step()
        plain += [_milliseconds(model, step) for _ in range(_PLAIN)]
        step.ready(_RECORDED + 1)
        try:
            recorded = record(step, pieces, _RECORDED, own)
        except OtherPieces:
            return _of(step.phase, plain).model_copy(update={"unseen": "each step is made of other operators"})
        for times in recorded:
            found = dict(sums(times.pieces, places))
            found[_PYTHON] = found.get(_PYTHON, 0.0) + times.between
            for place, ms in found.items():
                parts[place].append(ms)
    calls = {place: sum(other == place for other in places) for place in parts}
    by_themselves = Products(layers, tokens, heads, joins, own)
    alone = by_themselves.milliseconds()
    told = [_part(layers, place, calls[place], taken, alone, step.phase) for place, taken in parts.items()]
    told = _with_waiting(told, _waking())
    others = list(by_themselves.alternatives(turns))
    ordered = sorted(told, key=lambda part: -part.ms)
    update = {"threads": torch.get_num_threads(), "parts": ordered, "alternatives": others}
    return _of(step.phase, plain).model_copy(update=update)


def _milliseconds(model: Generates, step: Callable[[], object]) -> float:
    model.synchronize()
    began = time.perf_counter()
    step()
    model.synchronize()
    return 1000 * (time.perf_counter() - began)


def _of(phase: Phase, taken: Sequence[float]) -> Ledger:
    """Without parts."""
    low, high = mean_interval(taken)
    return Ledger(phase=phase, step_ms=statistics.fmean(taken), low=low, high=high)


def _part(layers: Layers, place: Place, calls: int, taken: Sequence[float], alone: Mapping[Place, float], phase: Phase) -> LedgerPart:
    low, high = mean_interval(taken)
    own = [layer for name, layer in layers.named.items() if layers.place[name] == place]
    return LedgerPart(
        kind=place.kind,
        layers=list(place.layers),
        kernels=sorted({_kernel(layer) for layer in own}),
        calls=calls,
        ms=statistics.fmean(taken),
        low=low,
        high=high,
        alone_ms=alone.get(place),
        bytes=sum(map(bytes_of, own)) if own and phase == "decode" else None,
    )


def _waking() -> list[float]:
    """Milliseconds that a parallel region takes beyond the work in it: none of one thread."""
    threads = torch.get_num_threads()
    if threads == 1:
        return [0.0]
    numbers = torch.ones(_GRAIN)

    def regions() -> float:
        taken = []
        for _ in range(_WAKINGS):
            until = time.perf_counter() + _GAP
            while time.perf_counter() < until:
                pass
            began = time.perf_counter()
            numbers.add_(1)
            taken.append(time.perf_counter() - began)
        return 1000 * statistics.median(taken)

    found = []
    try:
        for _ in range(_TIMES):
            torch.set_num_threads(1)
            one = regions()
            torch.set_num_threads(threads)
            found.append(max(0.0, regions() - one / threads))
    finally:
        torch.set_num_threads(threads)
    return found


def _kernel(layer: torch.nn.Module) -> str:
    return getattr(layer, "kernel", None) or str(dtype_of(layer)).removeprefix("torch.")


def _with_waiting(parts: list[LedgerPart], waking: Sequence[float]) -> list[LedgerPart]:
    """What threads wait as a part of its own, taken from the products, each of which has a parallel region."""
    products = [part for part in parts if part.kind in ("product", "head")]
    each, (low, high) = statistics.fmean(waking), mean_interval(waking)
    regions = sum(part.calls for part in products)
    if not each or not regions:
        return parts
    less = {id(part): min(part.ms, part.calls * each) for part in products}
    changed = [part.model_copy(update=_moved(part, less[id(part)])) if id(part) in less else part for part in parts]
    return [*changed, LedgerPart(kind="waiting", calls=regions, ms=sum(less.values()), low=regions * low, high=regions * high)]


def _moved(part: LedgerPart, less: float) -> dict[str, Any]:
    alone = None if part.alone_ms is None else max(0.0, part.alone_ms - less)
    return {"ms": part.ms - less, "low": part.low - less, "high": part.high - less, "alone_ms": alone}


def _blank(model: Generates, point: SpeedPoint, turns: int, reason: str) -> Ledger:
    """The time of a step alone."""
    step, taken = _Decoding(model, prompts(model, point), max(_ROOM, point.new_tokens)), list[float]()
    for _ in range(turns):
        step.ready(1)
        taken.append(_milliseconds(model, step))
    return _of("decode", taken).model_copy(update={"unseen": reason})
