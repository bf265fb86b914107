"""The steps that a ledger is of, one after the other, as they are timed."""

from __future__ import annotations

import time
from typing import ClassVar, Protocol

import torch

from slimbench.harness.measure.loaded import Generates, Step
from slimbench.harness.schema.ledger import Phase


class Repeats(Protocol):
    """One kind of step.

    Attributes:
        phase: Which.
        tokens: That go through the step, those of all sequences.
        warm: Steps that nobody times, at the beginning of a turn: the caches of the processor hold what other models left.
        timed: Steps of a turn that nobody records.
        recorded: Steps of a turn that are recorded.
    """

    phase: ClassVar[Phase]
    tokens: int
    warm: ClassVar[int]
    timed: ClassVar[int]
    recorded: ClassVar[int]

    def ready(self, steps: int) -> None:
        """Make room for so many steps; no more are taken until the next call."""

    def end(self) -> None:
        """Forget the text: others use the model's cache."""

    def __call__(self) -> None:
        """Take one."""


class Prefill:
    """The prompt goes through the model.

    Args:
        ids: Token ids, int64 [batch, prompt].
        room: Tokens that the cache is to have room for.
    """

    phase: ClassVar[Phase] = "prefill"
    warm: ClassVar[int] = 1
    timed: ClassVar[int] = 2
    recorded: ClassVar[int] = 2

    def __init__(self, model: Generates, ids: torch.Tensor, room: int) -> None:
        self._model, self._ids, self._room, self.tokens = model, ids, room, ids.numel()

    def ready(self, steps: int) -> None:
        """Nothing to do."""

    def end(self) -> None:
        """Nothing to do."""

    def __call__(self) -> None:
        self._model.prefill(self._ids, room=self._room)


class Decoding:
    """A step after the other, of the shapes that are timed; a new text is begun where one is at its end.

    Args:
        ids: Token ids, int64 [batch, prompt].
        room: Tokens behind the prompt.
    """

    phase: ClassVar[Phase] = "decode"
    warm: ClassVar[int] = 12
    timed: ClassVar[int] = 4
    recorded: ClassVar[int] = 4

    def __init__(self, model: Generates, ids: torch.Tensor, room: int) -> None:
        self._model, self._ids, self._room, self._left, self.tokens = model, ids, room, 0, len(ids)
        self._step: Step | None = None

    def ready(self, steps: int) -> None:
        """Begin a new text where this one has no room for so many steps."""
        if self._left < steps:
            self._step, self._left = self._model.prefill(self._ids, room=self._room), self._room - 1

    def end(self) -> None:
        """Others use the cache: the next step is of a new text."""
        self._left = 0

    def next(self) -> None:
        """A step, in a new text where there is no room for one."""
        self.ready(1)
        self()

    def __call__(self) -> None:
        assert self._step is not None
        self._step, self._left = self._model.decode_step(self._step), self._left - 1


def turn_of(step: Repeats) -> int:
    """Steps of a turn; before those that are recorded goes one for the profiler to settle."""
    return step.warm + step.timed + 1 + step.recorded


def plain(model: Generates, step: Repeats) -> float:
    """Milliseconds of the shortest of some steps that nobody records, behind some that nobody times: what else runs only adds to one."""
    step.ready(step.warm + step.timed)
    for _ in range(step.warm):
        step()
    return min(_milliseconds(model, step) for _ in range(step.timed))


def _milliseconds(model: Generates, step: Repeats) -> float:
    model.synchronize()
    began = time.perf_counter()
    step()
    model.synchronize()
    return 1000 * (time.perf_counter() - began)
