"""What the main thread does in one step, piece after piece, as torch's profiler sees it in the very step that is timed.

Threads of a product work inside the call that started them, so the pieces of the main thread and what lies between them are the step.
Recording takes time itself, once for each event, and more amid other work than in a loop of next to nothing. So what one takes is measured
on such steps, where these are short: by how much those that are recorded are longer than those that are not, in turns. It is taken off.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from slimbench.util.compat.profiler import calls
from slimbench.util.silence import libraries_silenced

_STEP = "slimbench step"
_LAYER = "slimbench layer "
_SCOPES = ("##", "Torch-Compiled", "TorchDynamo", "CompiledFunction", _LAYER)
_SESSIONS = 12
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
        between: Between them: Python, and what launches them; None: what is left of a step that nobody records.
    """

    pieces: tuple[float, ...]
    between: float | None


class OtherPieces(Exception):
    """A step called other operators than the one before it."""


def outline(step: Callable[[], object], layers: Mapping[str, torch.nn.Module]) -> list[Piece]:
    """The pieces of a step, in order.

    Args:
        layers: Modules whose pieces are to be told apart where they are called, by name.
    """
    with watched(layers):
        (root,) = steps_among(events_of(step, 1, shapes=True))
    return [piece_of(event, layer) for event, layer in topmost(root) if not is_scope(event)]


def record(step: Callable[[], object], pieces: Sequence[Piece], count: int, own: float) -> list[Times]:
    """Record some steps that are like the one that was outlined.

    Args:
        own: Milliseconds that the recording of an event takes.

    Raises:
        OtherPieces: One is not made of these.
    """
    return [_times(root, pieces, own) for root in steps_among(events_of(step, count, shapes=False))]


def _times(root: Any, pieces: Sequence[Piece], own: float) -> Times:
    """What a step took, without what the recording of each event takes: of a call one half lies within its own time."""
    found = [event for event, _ in topmost(root)]
    calls = [event for event in found if not is_scope(event)]
    if [event.name for event in calls] != [piece.name for piece in pieces]:
        raise OtherPieces
    within = [sum(1 for _ in below(event)) for event in calls]
    taken = [event.time_range.elapsed_us() / 1000 for event in calls]
    times = tuple(max(0.0, ms - own * (events + 0.5)) for ms, events in zip(taken, within, strict=True))
    return Times(times, max(0.0, root.time_range.elapsed_us() / 1000 - sum(taken) - own * (len(found) - len(calls) / 2)))


def events_of(step: Callable[[], object], count: int, shapes: bool, card: bool = False) -> list[Any]:
    """What the profiler sees of steps; one more comes first, for it to settle.

    Args:
        card: Record what a card does, too.
    """
    with libraries_silenced(), profile(activities=_activities(card), record_shapes=shapes) as recorded:
        step()
        for _ in range(count):
            with record_function(_STEP):
                step()
    return list(recorded.events() or ()) if card else calls(recorded)


def _activities(card: bool) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if card else [])]


def steps_among(events: Sequence[Any]) -> list[Any]:
    """The steps among events, one after the other."""
    return [event for event in events if event.name == _STEP and event.device_type == DeviceType.CPU]


def piece_of(event: Any, layer: str | None) -> Piece:
    """A call, as a ledger knows it."""
    shapes = tuple(tuple(shape) for shape in event.input_shapes or () if shape and all(isinstance(size, int) for size in shape))
    return Piece(event.name, layer, shapes, tuple(each.name for each in below(event)))


def topmost(event: Any, layer: str | None = None) -> Iterator[tuple[Any, str | None]]:
    """The calls that no other call holds, each with its layer, and before them the scopes that they lie in."""
    for child in sorted(event.cpu_children, key=lambda each: each.time_range.start):
        inside = child.name.removeprefix(_LAYER) if child.name.startswith(_LAYER) else layer
        yield child, inside
        if is_scope(child):
            yield from topmost(child, inside)


def is_scope(event: Any) -> bool:
    """Whether a name was given to what lies within, and nothing is computed by it."""
    found: bool = event.name.startswith(_SCOPES)
    return found


def below(event: Any) -> Iterator[Any]:
    """All events within one."""
    for child in event.cpu_children:
        yield child
        yield from below(child)


@contextmanager
def watched(layers: Mapping[str, torch.nn.Module]) -> Iterator[None]:
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


def recording(step: Callable[[], object], warm: int) -> float:
    """Milliseconds that the recording of an event takes, of steps that are alike.

    Args:
        warm: Steps that nobody times, before those that are not recorded.
    """
    bare, longer, events = list[float](), list[float](), 1
    for _ in range(_SESSIONS):
        for _ in range(warm):
            step()
        bare.append(min(_milliseconds(step) for _ in range(_ROUNDS)))
        roots = steps_among(events_of(step, _ROUNDS, shapes=False))
        longer.append(min(root.time_range.elapsed_us() / 1000 for root in roots) / bare[-1] - 1)
        events = max(1, sum(1 for _ in below(roots[-1])))
    return max(0.0, statistics.median(longer)) * statistics.median(bare) / events


def _milliseconds(step: Callable[[], object]) -> float:
    began = time.perf_counter()
    step()
    return 1000 * (time.perf_counter() - began)
