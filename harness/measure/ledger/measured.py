"""The ledgers of loaded models: steps that are recorded and steps that are not, of one model after the other in each turn."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import get_args

import torch

from slimbench.harness.config.schema import SpeedPoint
from slimbench.harness.measure.dynamic.texts import prompts
from slimbench.harness.measure.evidence import bytes_of
from slimbench.harness.measure.ledger.counted import Counted
from slimbench.harness.measure.ledger.parts import Layers, is_fused, joins, multiplies, sums
from slimbench.harness.measure.ledger.place import Place
from slimbench.harness.measure.ledger.products import Products
from slimbench.harness.measure.ledger.recorded import OtherPieces, recording
from slimbench.harness.measure.ledger.rehearsals import rehearsed
from slimbench.harness.measure.ledger.steps import Decoding, Prefill, Repeats, plain, turn_of
from slimbench.harness.measure.ledger.turns import Takes, Turn, by_place, ledger_of, part_of, steadied
from slimbench.harness.measure.ledger.waking import waking
from slimbench.harness.measure.ledger.watch import finished, watch_of
from slimbench.harness.measure.loaded import CountsTime, Generates, RunsLayers
from slimbench.harness.schema.ledger import Ledger, LedgerPart, Phase

_LEAST_TURNS = 6
_STEPS_OF_TURN: dict[Phase, int] = {"decode": Decoding.recorded, "prefill": 4 * Decoding.recorded}
_ROOM = 2 + Decoding.warm + Decoding.timed + Decoding.recorded
"""Tokens of a text at least: a turn has no prompt in it."""
_SHORT = 8
_PYTHON, _WAITING = Place("python"), Place("waiting")
_REGION = ("product", "head")
"""Kinds of parts each of whose products is a parallel region: what else a layer calls is too small for one."""


def ledgers(
    models: Sequence[Generates], point: SpeedPoint, steps: int, phases: Sequence[Phase] = get_args(Phase), rehearses: bool = True
) -> list[list[Ledger]]:
    """Of a decode step and of a prefill, for each model; of a decode step's time alone where the engine shows no more.

    All models take part in each turn, so that the machine is the same for all, whatever it does in the meantime.

    Args:
        steps: Of decoding that are recorded of each model, in at least six turns; a prompt, which takes longer, goes through a quarter
            of these turns.
        phases: Of which.
        rehearses: Other settings are timed too, of the first model.
    """
    found: list[list[Ledger]] = [[] for _ in models]
    records = [_Recording(model, point) for model in models]
    with torch.inference_mode():
        for phase in phases:
            begun = [(held, takes) for held, of in zip(found, records, strict=True) if (takes := _begun(of, phase))]
            turns = max(_LEAST_TURNS, -(-steps // _STEPS_OF_TURN[phase]))
            taken = _in_turns([takes for _, takes in begun], turns)
            for (held, takes), own in zip(begun, taken, strict=True):
                held.append(takes.ledger(own, rehearses=rehearses and held is found[0]))
    return found


def _in_turns(begun: Sequence[Takes], turns: int) -> list[list[Turn]]:
    """The turns of each, of which those are left out in which a step was made of other operators than the others of its model."""
    taken: list[list[Turn]] = [[] for _ in begun]
    for _ in range(turns):
        wait = waking()
        for own, takes in zip(taken, begun, strict=True):
            own.append(takes.turn(wait))
    steady = [2 * sum(turn.parts is not None for turn in own) > turns for own in taken]
    kept = [at for at in range(turns) if all(own[at].parts is not None for own, is_steady in zip(taken, steady, strict=True) if is_steady)]
    return [[own[at] for at in kept] if is_steady and kept else own for own, is_steady in zip(taken, steady, strict=True)]


class _Recording:
    """The texts of a model, and what recording its steps takes.

    Attributes:
        ids: Prompts.
        room: Tokens behind them.
    """

    def __init__(self, model: Generates, point: SpeedPoint) -> None:
        self.model, self.ids, self.room = model, prompts(model, point), max(_ROOM, point.new_tokens)
        self._own: dict[Phase, float] = {}

    def own(self, phase: Phase) -> float:
        """Milliseconds that the recording of an event takes: of decode steps, or of short prompts, whose operators are those of long ones.

        On a card it changes no kernel.
        """
        if phase not in self._own:
            short = Prefill(self.model, self.ids[:, :_SHORT], self.room)
            step = Decoding(self.model, self.ids, self.room).next if phase == "decode" else short
            self._own[phase] = recording(step, Decoding.warm) if watch_of(self.model.device).has_regions else 0.0
        return self._own[phase]


def _begun(of: _Recording, phase: Phase) -> Takes | None:
    """None: what the engine shows is told with its decode step."""
    model, ids, room = of.model, of.ids, of.room

    def begun(of: Generates) -> Repeats:
        return Decoding(of, ids, room) if phase == "decode" else Prefill(of, ids, room)

    if isinstance(model, CountsTime) and not model.slots:
        return Counted(model, begun)
    if reason := _unseen(model):
        return _Blank(model, begun(model), reason) if phase == "decode" else None
    assert isinstance(model, RunsLayers)
    account = _Account(of, model, begun)
    if not account.pieces:
        return _Blank(model, begun(model), "no one may profile this card") if phase == "decode" else None
    return account


def _unseen(model: Generates) -> str | None:
    if model.slots:
        return "a policy decides what runs in a step"
    if len(model.devices) > 1:
        return "several cards work on a step"
    return None if isinstance(model, RunsLayers) else model.uncounted


class _Blank:
    """The time of a step alone.

    Args:
        reason: Why.
    """

    def __init__(self, model: Generates, step: Repeats, reason: str) -> None:
        self._model, self._step, self._reason = model, step, reason

    def turn(self, wait: float) -> Turn:
        return Turn(plain(self._model, self._step), wait)

    def ledger(self, turns: Sequence[Turn], rehearses: bool) -> Ledger:
        return ledger_of(self._step.phase, turns, unseen=self._reason)


class _Account:
    """The parts of one kind of step.

    Args:
        begun: The step of a model.
    """

    def __init__(self, of: _Recording, model: RunsLayers, begun: Callable[[Generates], Repeats]) -> None:
        step = begun(model)
        self._model, self._begun, self._step, self._heads, self._watch = model, begun, step, len(of.ids), watch_of(model.device)
        layers = Layers.of(model.module)
        step.ready(3)
        step()  # what is compiled is compiled before anything is hooked onto layers
        self._whole = finished(step, model.device)
        self.pieces = self._watch.outline(self._whole, layers.named)
        self._joins = any(map(joins, self.pieces))
        self._layers = Layers.of(model.module, self._joins, self._watch.blurs(self.pieces))
        self._places = self._watch.places_of(self.pieces, self._layers, step.tokens)
        self._calls = {place: self._places.count(place) for place in (*self._places, _PYTHON)}
        self._regions = Counter[Place]()
        if self._watch.has_regions:
            pairs = zip(self._places, self.pieces, strict=True)
            self._regions.update(place for place, piece in pairs if place.kind in _REGION and multiplies(piece))
        is_eager = not self._joins and not any(map(is_fused, self.pieces))
        self._own = of.own("prefill" if is_eager else step.phase)  # then operators of both are the same
        step.end()

    def turn(self, wait: float) -> Turn:
        self._step.ready(turn_of(self._step))
        whole = plain(self._model, self._step)
        try:
            recorded = self._watch.record(self._whole, self.pieces, self._step.recorded, self._own)
        except OtherPieces:
            return Turn(whole, wait)
        shortest = min(recorded, key=lambda times: sum(times.pieces) + (times.between or 0.0))
        taken = {_PYTHON: 0.0} | dict(sums(shortest.pieces, self._places))
        taken[_PYTHON] += max(0.0, whole - sum(shortest.pieces)) if shortest.between is None else shortest.between
        waits = {place: min(ms, self._regions[place] * wait) for place, ms in taken.items()}
        return Turn(whole, wait, {place: ms - waits[place] for place, ms in taken.items()} | {_WAITING: sum(waits.values())})

    def ledger(self, turns: Sequence[Turn], rehearses: bool) -> Ledger:
        if any(turn.parts is None for turn in turns):
            return ledger_of(self._step.phase, turns, unseen="its steps are made of other operators each time")
        turns = steadied(turns)
        products = Products(self._layers, self._step.tokens, self._heads, self._joins, self._own, self._model.device)
        wait, alone = statistics.median(turn.wait for turn in turns), products.milliseconds()
        left = {place: max(0.0, ms - self._regions[place] * wait) for place, ms in alone.items()}
        calls = self._calls | {_WAITING: self._regions.total()}
        parts = [self._part(place, calls[place], taken, left.get(place)) for place, taken in by_place(turns).items() if any(taken)]
        others = list(rehearsed(self._model, self._layers, self._begun, 3 * self._step.recorded)) if rehearses else []
        return ledger_of(self._step.phase, turns, parts, alternatives=others)

    def _part(self, place: Place, calls: int, taken: Sequence[float], alone: float | None) -> LedgerPart:
        own = [layer for name, layer in self._layers.named.items() if self._layers.place[name] == place]
        read = sum(map(bytes_of, own)) if own and self._step.phase == "decode" else None
        return part_of(place, calls, taken, kernels=sorted({_kernel(layer) for layer in own}), alone_ms=alone, bytes=read)


def _kernel(layer: torch.nn.Module) -> str:
    held = getattr(layer, "dtype", None) or getattr(layer, "weight").dtype  # noqa: B009
    return getattr(layer, "kernel", None) or str(held).removeprefix("torch.")
