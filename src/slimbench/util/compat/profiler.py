"""torch's profiler: what it saw of the processor, read many times sooner than by `events()`, which gathers much that nobody asks for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.autograd import DeviceType
from torch.autograd.profiler_util import Interval
from torch.profiler import profile

_OF_PROFILER = ("profiler::", "[")


@dataclass
class Call:
    """A call of an operator, or a scope with a name, under the names that `FunctionEvent` has.

    Attributes:
        input_shapes: Of tensors that it was given; empty where shapes were not recorded.
        cpu_children: Calls within it, those of these left out, in order.
    """

    name: str
    time_range: Interval
    input_shapes: Sequence[Sequence[int]] = ()
    device_type: DeviceType = DeviceType.CPU
    cpu_children: list[Call] = field(default_factory=list)


def calls(recorded: profile) -> list[Call]:
    """Every call on the processor of what recorded nothing else, those of a thread in order.

    Unlike `events()` it keeps a call that is all of another one of its name: both took time to record.
    """
    results: Any = recorded.profiler and recorded.profiler.kineto_results
    if not results:
        return []
    threads, first = defaultdict[int, list[Call]](list), results.trace_start_ns()
    for event in results.events():
        name, thread = event.name(), event.start_thread_id()
        if not name.startswith(_OF_PROFILER) and thread == event.end_thread_id() and not event.is_hidden_event():
            within = Interval((event.start_ns() - first) / 1000, (event.end_ns() - first) / 1000)
            threads[thread].append(Call(name, within, event.shapes() if recorded.record_shapes else ()))
    return [call for made in threads.values() for call in nested(made)]


def nested(made: Iterable[Call]) -> list[Call]:
    """Calls of one thread, in order, each among the children of the smallest one that holds it."""
    ordered, open_ = sorted(made, key=lambda call: (call.time_range.start, -call.time_range.end)), list[Call]()
    for call in ordered:
        while open_ and call.time_range.end > open_[-1].time_range.end:
            open_.pop()
        if open_:
            open_[-1].cpu_children.append(call)
        open_.append(call)
    return ordered
