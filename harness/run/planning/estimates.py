"""How long a stage will take, from the records of earlier ones."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable

from slimbench.harness.run.planning.plan import Plan, PlannedCell, Task
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.store.store import Store

_NEWEST = 3  # records of a pipeline that are looked into


class Estimates:
    """Seconds by stage, model and pipeline. A pipeline's folder is looked into when it is first asked for, and no other.

    Where a pipeline has no time of its own, that of the same methods with other settings stands in, then the mean of the stage.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seconds: dict[tuple[Stage, str, str], list[float]] = defaultdict(list)
        self._known: set[tuple[str, str]] = set()

    def learn(self, cell: PlannedCell, stage: Stage, seconds: float) -> None:
        self._look(cell)
        self._seconds[stage, cell.identity.model, cell.identity.pipeline].append(seconds)

    def seconds(self, cell: PlannedCell, stage: Stage) -> float | None:
        """The expected wall-clock seconds; None where nothing like it is known."""
        self._look(cell)
        identity = cell.identity
        if own := self._seconds.get((stage, identity.model, identity.pipeline)):
            return statistics.fmean(own[-_NEWEST:])
        of_stage = {(model, name): times for (kind, model, name), times in self._seconds.items() if kind is stage and times}
        methods = _methods(identity.pipeline)
        like = [times[-1] for (model, name), times in of_stage.items() if model == identity.model and _methods(name) == methods]
        like = like or [times[-1] for (model, _), times in of_stage.items() if model == identity.model]
        like = like or [times[-1] for times in of_stage.values()]
        return statistics.fmean(like) if like else None

    def total(self, plan: Plan, tasks: Iterable[Task]) -> float | None:
        """Seconds of some tasks one after another; None where one of them cannot be estimated."""
        each = [self.seconds(plan.cells[task.cell], task.stage) for task in tasks if not task.refusal]
        return None if None in each else sum(seconds for seconds in each if seconds)

    def _look(self, cell: PlannedCell) -> None:
        place = cell.identity.model, cell.identity.pipeline
        if place in self._known:
            return
        self._known.add(place)
        for stage in Stage:
            folder = self._store.path(cell.identity, stage, cell.hardware(stage)).parent
            newest = sorted(folder.glob(f"{stage.value}-*.json"), key=lambda path: path.stat().st_mtime)[-_NEWEST:]
            for path in newest:
                try:
                    facts = json.loads(path.read_bytes())
                    if facts["status"] == Status.OK:
                        self._seconds[stage, *place].append(float(facts["wall_seconds"]))
                except (OSError, ValueError, LookupError, TypeError):
                    continue


def _methods(pipeline: str) -> str:
    """A pipeline without the settings of its steps."""
    return "+".join(step.partition("(")[0] for step in pipeline.split("+"))
