"""The ledgers of loaded models: steps that are recorded and steps that are not, of one model after the other in each turn."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol, get_args

import torch

from slimbench.harness.config.schema import SpeedPoint
from slimbench.harness.measure.dynamic.texts import prompts
from slimbench.harness.measure.evidence import bytes_of
from slimbench.harness.measure.ledger.counted import Counted
from slimbench.harness.measure.ledger.parts import Layers, joins, places_of, sums
from slimbench.harness.measure.ledger.place import Place
from slimbench.harness.measure.ledger.products import Products, dtype_of
from slimbench.harness.measure.ledger.recorded import OtherPieces, outline, record, recording
from slimbench.harness.measure.ledger.steps import Decoding, Prefill, Repeats, plain, turn_of
from slimbench.harness.measure.ledger.waking import waking
from slimbench.harness.measure.loaded import CountsTime, Generates
from slimbench.harness.schema.ledger import Ledger, LedgerPart, Phase
from slimbench.harness.stats.intervals import median_interval

_LEAST_TURNS = 6
_ROOM = 2 + Decoding.warm + Decoding.timed + Decoding.recorded
"""Tokens of a text at least: a turn has no prompt in it."""
_PYTHON, _WAITING = Place("python"), Place("waiting")
_REGION = ("product", "head")
"""Kinds of parts each of whose calls is a parallel region."""


def ledgers(models: Sequence[Generates], point: SpeedPoint, steps: int, phases: Sequence[Phase] = get_args(Phase)) -> list[list[Ledger]]:
    """Of a decode step and of a prefill, for each model; of a decode step's time alone where the engine shows no more.

    Other settings are foretold for the first model.

    All models take part in each turn, so that the machine is the same for all, whatever it does in the meantime.

    Args:
        steps: Of decoding that are recorded of each model, as many in each of at least six turns.
        phases: Of which.
    """
    turns = max(_LEAST_TURNS, -(-steps // Decoding.recorded))
    found: list[list[Ledger]] = [[] for _ in models]
    with torch.inference_mode():
        for phase in phases:
            begun = [_begun(model, point, phase) for model in models]
            for _ in range(turns):
                wait = waking()
                for each in begun:
                    if each:
                        each.turn(wait)
            for number, (held, each) in enumerate(zip(found, begun, strict=True)):
                if each:
                    held.append(each.ledger(foretells=number == 0))
    return found


class _Takes(Protocol):
    """The ledger of one model, as it grows."""

    def turn(self, wait: float) -> None:
        """Some steps more.

        Args:
            wait: Milliseconds that threads wait in a parallel region.
        """

    def ledger(self, foretells: bool) -> Ledger:
        """What all turns gave.

        Args:
            foretells: Other settings are timed too.
        """


def _begun(model: Generates, point: SpeedPoint, phase: Phase) -> _Takes | None:
    """None: what the engine shows is told with its decode step."""
    ids, room = prompts(model, point), max(_ROOM, point.new_tokens)

    def begun(of: Generates) -> Repeats:
        return Decoding(of, ids, room) if phase == "decode" else Prefill(of, ids, room)

    if isinstance(model, CountsTime) and not model.slots:
        return Counted(model, begun)
    if reason := _unseen(model):
        return _Blank(model, begun(model), reason) if phase == "decode" else None
    return _Account(model, begun(model), ids, room)


def _unseen(model: Generates) -> str | None:
    if getattr(model, "module", None) is None:
        return "the engine does not show what runs in a step"
    if model.device.type != "cpu":
        return "steps of a card are not recorded yet"
    if model.slots:
        return "a policy decides what runs in a step"
    return None


class _Blank:
    """The time of a step alone.

    Args:
        reason: Why.
    """

    def __init__(self, model: Generates, step: Repeats, reason: str) -> None:
        self._model, self._step, self._reason, self._turns = model, step, reason, list[float]()

    def turn(self, wait: float) -> None:
        self._turns.append(plain(self._model, self._step))

    def ledger(self, foretells: bool) -> Ledger:
        return _of(self._step.phase, self._turns).model_copy(update={"unseen": self._reason})


class _Account:
    """The parts of one kind of step, turn by turn."""

    def __init__(self, model: Generates, step: Repeats, ids: torch.Tensor, room: int) -> None:
        module = getattr(model, "module")  # noqa: B009
        self._model, self._step, self._heads = model, step, len(ids)
        layers = Layers.of(module)
        step.ready(3)
        step()  # what is compiled is compiled before anything is hooked onto layers
        self._pieces = outline(step, layers.named)
        self._joins = any(map(joins, self._pieces))
        self._layers = Layers.of(module, self._joins)
        self._places = places_of(self._pieces, self._layers, step.tokens)
        self._calls = {place: self._places.count(place) for place in (*self._places, _PYTHON)}
        self._own = recording(Decoding(model, ids, room).next)
        self._plain, self._parts, self._waits = list[float](), defaultdict[Place, list[float]](list), list[float]()
        self._changes = False

    def turn(self, wait: float) -> None:
        self._step.ready(turn_of(self._step))
        self._plain.append(plain(self._model, self._step))
        try:
            recorded = record(self._step, self._pieces, self._step.recorded, self._own)
        except OtherPieces:
            self._changes = True
            return
        taken = defaultdict[Place, list[float]](list)
        for times in recorded:
            for place, ms in ({_PYTHON: 0.0} | dict(sums(times.pieces, self._places))).items():
                taken[place].append(ms + (times.between if place == _PYTHON else 0.0))
        waited = 0.0
        for place, each in taken.items():
            ms = statistics.fmean(each)
            less = min(ms, self._waiting(place, wait))
            self._parts[place].append(ms - less)
            waited += less
        self._parts[_WAITING].append(waited)
        self._waits.append(wait)

    def _waiting(self, place: Place, wait: float) -> float:
        return self._calls[place] * wait if place.kind in _REGION else 0.0

    def ledger(self, foretells: bool) -> Ledger:
        if self._changes:
            return _of(self._step.phase, self._plain).model_copy(update={"unseen": "each step is made of other operators"})
        products = Products(self._layers, self._step.tokens, self._heads, self._joins, self._own)
        wait, alone = statistics.median(self._waits), products.milliseconds()
        left = {place: max(0.0, ms - self._waiting(place, wait)) for place, ms in alone.items()}
        regions = sum(calls for place, calls in self._calls.items() if place.kind in _REGION)
        calls = self._calls | {_WAITING: regions}
        parts = [self._part(place, calls[place], turns, left.get(place)) for place, turns in self._parts.items() if any(turns)]
        others = list(products.alternatives(3 * self._step.recorded)) if foretells else []
        ordered = sorted(parts, key=lambda part: -part.ms)
        update = {"threads": torch.get_num_threads(), "parts": ordered, "alternatives": others}
        return _of(self._step.phase, self._plain).model_copy(update=update)

    def _part(self, place: Place, calls: int, turns: Sequence[float], alone: float | None) -> LedgerPart:
        low, high = median_interval(turns)
        own = [layer for name, layer in self._layers.named.items() if self._layers.place[name] == place]
        return LedgerPart(
            kind=place.kind,
            layers=list(place.layers),
            kernels=sorted({_kernel(layer) for layer in own}),
            calls=calls,
            ms=statistics.median(turns),
            low=low,
            high=high,
            turns=list(turns),
            alone_ms=alone,
            bytes=sum(map(bytes_of, own)) if own and self._step.phase == "decode" else None,
        )


def _of(phase: Phase, turns: Sequence[float]) -> Ledger:
    """Without parts."""
    low, high = median_interval(turns)
    return Ledger(phase=phase, step_ms=statistics.median(turns), low=low, high=high, turns=list(turns))


def _kernel(layer: torch.nn.Module) -> str:
    return getattr(layer, "kernel", None) or str(dtype_of(layer)).removeprefix("torch.")
