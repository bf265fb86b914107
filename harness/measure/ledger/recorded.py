"""What the main thread does in one step, piece after piece, as torch's profiler sees it in the very step that is timed.

Threads of a product work inside the call that started them, so the pieces of the main thread and what lies between them are the step.
Recording takes time itself, once for each event. What one takes is measured on operators that do next to nothing, behind such a step, and
taken off; an operator within another takes less than one that is called by itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from slimbench.util.silence import libraries_silenced

_STEP = "slimbench step"
_LAYER = "slimbench layer "
_SCOPES = ("##", "Torch-Compiled", "TorchDynamo", "CompiledFunction", "slimbench::packed_blocks", _LAYER)
_PROBES = 32
_SESSIONS = 6
_ROUNDS = 4


@dataclass(frozen=True)
class Piece:
    """An operator or fused kernel that the main thread called, in no other one.

    Attributes:
        name: As the profiler has it.
        layer: Name of the layer in whose forward pass it ran; None outside of all of them, and in compiled code.
        shapes: Of its tensor inputs, but those in lists.
        inner: Names of the operators inside it.
    """

    name: str
    layer: str | None
    shapes: tuple[tuple[int, ...], ...]
    inner: tuple[str, ...]


@dataclass(frozen=True)
class Times:
    """Milliseconds of one step, those that recording took left out.

    Attributes:
        pieces: Of each, in order.
        between: Between them: Python, and what launches them.
    """

    pieces: tuple[float, ...]
    between: float


@dataclass(frozen=True)
class Overhead:
    """Milliseconds that recording takes.

    Attributes:
        call: Of an operator that no other one calls.
        inner: Of one within another.
    """

    call: float
    inner: float


class OtherPieces(Exception):
    """A step called other operators than the one before it."""


def outline(step: Callable[[], object], layers: Mapping[str, torch.nn.Module]) -> list[Piece]:
    """The pieces of a step, in order.

    Args:
        layers: Modules whose pieces are to be told apart where they are called, by name.
    """
    with _watched(layers):
        (root,) = _recorded(step, 1, shapes=True)
    return [_piece(event, layer) for event, layer in _topmost(root, None) if event is not None]


def record(step: Callable[[], object], pieces: Sequence[Piece], count: int, overhead: Overhead) -> list[Times]:
    """Record some steps that are like the one that was outlined.

    Args:
        overhead: Of the recording, which is taken off.

    Raises:
        OtherPieces: One is not made of these.
    """
    return [_times(root, pieces, overhead) for root in _recorded(step, count, shapes=False)]


def _times(root: Any, pieces: Sequence[Piece], overhead: Overhead) -> Times:
    """What a step took, without what the recording of each event takes: of a call one half lies within its own time."""
    found = [event for event, _ in _topmost(root, None)]
    calls, scopes = [event for event in found if event is not None], found.count(None)
    if [event.name for event in calls] != [piece.name for piece in pieces]:
        raise OtherPieces
    within = [sum(1 for _ in _below(event)) for event in calls]
    taken = [event.time_range.elapsed_us() / 1000 for event in calls]
    times = tuple(max(0.0, ms - overhead.inner * events - overhead.call / 2) for ms, events in zip(taken, within, strict=True))
    return Times(times, max(0.0, root.time_range.elapsed_us() / 1000 - sum(taken) - overhead.call * (len(calls) / 2 + scopes)))


def _recorded(step: Callable[[], object], count: int, shapes: bool) -> list[Any]:
    """The events of steps; one more comes first, for the profiler to settle."""
    with libraries_silenced(), profile(activities=[ProfilerActivity.CPU], record_shapes=shapes) as recorded:
        step()
        for _ in range(count):
            with record_function(_STEP):
                step()
    return [event for event in recorded.events() or () if event.name == _STEP]


def _piece(event: Any, layer: str | None) -> Piece:
    shapes = tuple(tuple(shape) for shape in event.input_shapes or () if shape and all(isinstance(size, int) for size in shape))
    return Piece(event.name, layer, shapes, tuple(each.name for each in _below(event)))


def _topmost(event: Any, layer: str | None) -> Iterator[tuple[Any, str | None]]:
    """The calls that no other call holds, each with its layer, and None for each scope that was looked into."""
    for child in sorted(event.cpu_children, key=lambda each: each.time_range.start):
        if child.name.startswith(_SCOPES):
            yield None, layer
            yield from _topmost(child, child.name.removeprefix(_LAYER) if child.name.startswith(_LAYER) else layer)
        else:
            yield child, layer


def _below(event: Any) -> Iterator[Any]:
    for child in event.cpu_children:
        yield child
        yield from _below(child)


@contextmanager
def _watched(layers: Mapping[str, torch.nn.Module]) -> Iterator[None]:
    """Within it the calls of layers are recorded by name."""
    with ExitStack() as hooks:
        for name, layer in layers.items():
            scope = _Scope(name)
            hooks.callback(layer.register_forward_pre_hook(scope.enter).remove)
            hooks.callback(layer.register_forward_hook(scope.leave, always_call=True).remove)
        yield


class _Scope:
    def __init__(self, name: str) -> None:
        self._name, self._open = _LAYER + name, list[Any]()

    def enter(self, *_: Any) -> None:
        self._open.append(record_function(self._name))
        self._open[-1].__enter__()

    def leave(self, *_: Any) -> None:
        self._open.pop().__exit__(None, None, None)


def recording(step: Callable[[], object]) -> Overhead:
    """What recording takes: of small operators right behind a step, whose data the caches then hold."""
    number, weight = torch.zeros(1, 1, 8), torch.zeros(8, 8)
    call, _ = _overhead(step, lambda: number.mul(number))
    whole, events = _overhead(step, lambda: torch.nn.functional.linear(number, weight))
    return Overhead(call, max(0.0, whole - call) / (events - 1))


def _overhead(step: Callable[[], object], probe: Callable[[], object]) -> tuple[float, int]:
    """Milliseconds that the recording of a small call takes, behind a step, and its operators."""

    def milliseconds() -> float:
        step()
        began = time.perf_counter()
        for _ in range(_PROBES):
            probe()
        return 1000 * (time.perf_counter() - began)

    taken = []
    for _ in range(_SESSIONS):
        bare = statistics.median(milliseconds() for _ in range(_ROUNDS))
        with libraries_silenced(), profile(activities=[ProfilerActivity.CPU]):
            milliseconds()
            taken.append(statistics.median(milliseconds() for _ in range(_ROUNDS)) - bare)
    (root,) = _recorded(probe, 1, shapes=False)
    return max(0.0, statistics.median(taken)) / _PROBES, sum(1 for _ in _below(root))
