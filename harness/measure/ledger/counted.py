"""The ledger of an engine that shows no operators, by counters of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from slimbench.harness.measure.ledger.place import Place
from slimbench.harness.measure.ledger.steps import Repeats, plain
from slimbench.harness.measure.ledger.turns import Turn, by_place, ledger_of, part_of, steadied
from slimbench.harness.measure.loaded import CountsTime, Generates
from slimbench.harness.schema.ledger import Ledger

_PYTHON = Place("python")


class Counted:
    """What the counters of an engine say of one kind of step; what they leave of it is Python and launch.

    Args:
        begun: The step of a model.
    """

    def __init__(self, model: CountsTime, begun: Callable[[Generates], Repeats]) -> None:
        self._model, self._begun, self._step, self._calls = model, begun, begun(model), dict[Place, int]()

    def turn(self, wait: float) -> Turn:
        """Some steps without and some with counters; how long threads wait is in what the engine counts."""
        whole = plain(self._model, self._step)
        self._step.end()  # counters that are always on are those of the same model and its cache
        twin = self._model.counting()
        step = self._begun(twin)
        step.ready(step.warm + step.recorded)
        for _ in range(step.warm):
            step()
        twin.counted()
        began = time.perf_counter()
        for _ in range(step.recorded):
            step()
        around, found = 1000 * (time.perf_counter() - began), twin.counted()
        parts = {place: max(0.0, ms) / step.recorded for place, (_, ms) in found.items()}
        self._calls |= {place: calls // step.recorded for place, (calls, _) in found.items()}
        return Turn(whole, wait, parts | {_PYTHON: max(0.0, around / step.recorded - sum(parts.values()))})

    def ledger(self, turns: Sequence[Turn], rehearses: bool) -> Ledger:
        """What turns gave; counters tell of no other setting."""
        steady = by_place(steadied(turns))
        parts = [part_of(place, self._calls.get(place, 0), taken) for place, taken in steady.items() if any(taken)]
        return ledger_of(self._step.phase, turns, parts, unseen=self._model.uncounted)
