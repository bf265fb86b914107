"""The ledger of an engine that shows no operators, by counters of its own."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from slimbench.harness.measure.ledger.place import Place
from slimbench.harness.measure.ledger.steps import Repeats, plain
from slimbench.harness.measure.loaded import CountsTime, Generates
from slimbench.harness.schema.ledger import Ledger, LedgerPart
from slimbench.harness.stats.intervals import median_interval

_PYTHON = Place("python")


class Counted:
    """What the counters of an engine say of one kind of step, turn by turn; what they leave of it is Python and launch.

    Args:
        begun: The step of a model.
    """

    def __init__(self, model: CountsTime, begun: Callable[[Generates], Repeats]) -> None:
        self._model, self._begun, self._step = model, begun, begun(model)
        self._plain, self._parts, self._calls = list[float](), defaultdict[Place, list[float]](list), dict[Place, int]()

    def turn(self, wait: float) -> None:
        """Some steps without and some with counters; how long threads wait is in what the engine counts."""
        self._plain.append(plain(self._model, self._step))
        twin = self._model.counting()
        step = self._begun(twin)
        count = step.recorded
        step.ready(step.warm + count)
        for _ in range(step.warm):
            step()
        twin.counted()
        began = time.perf_counter()
        for _ in range(count):
            step()
        whole, found = 1000 * (time.perf_counter() - began), twin.counted()
        for place, (calls, ms) in found.items():
            self._parts[place].append(ms / count)
            self._calls[place] = calls // count
        self._parts[_PYTHON].append(max(0.0, whole - sum(ms for _, ms in found.values())) / count)

    def ledger(self, foretells: bool) -> Ledger:
        """What all turns gave; counters foretell nothing."""
        low, high = median_interval(self._plain)
        turns = len(self._plain)
        parts = [self._part(place, taken) for place, taken in self._parts.items() if len(taken) == turns and any(taken)]
        return Ledger(
            phase=self._step.phase,
            step_ms=statistics.median(self._plain),
            low=low,
            high=high,
            turns=self._plain,
            threads=torch.get_num_threads(),
            parts=sorted(parts, key=lambda part: -part.ms),
            unseen=self._model.uncounted,
        )

    def _part(self, place: Place, taken: Sequence[float]) -> LedgerPart:
        low, high = median_interval(taken)
        layers, calls = list(place.layers), self._calls.get(place, 0)
        return LedgerPart(kind=place.kind, layers=layers, calls=calls, ms=statistics.median(taken), low=low, high=high, turns=list(taken))
