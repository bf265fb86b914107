"""What a plan would do: for each cell what is recorded of it, what would be run, and what cannot be."""

from __future__ import annotations

from dataclasses import dataclass, field

from slimbench.harness.run.hub import unavailable
from slimbench.harness.run.planning.ledger import Ledger
from slimbench.harness.run.planning.plan import PlannedCell
from slimbench.harness.schema.identity import Stage

RUN, CANNOT_RUN = "run", "cannot run"


@dataclass(frozen=True)
class Outlook:
    """Of a cell: for each stage `recorded STATUS`, `run` or `cannot run`, and the reason where it cannot or did not end well."""

    cell: PlannedCell
    stages: dict[Stage, str] = field(default_factory=dict)
    reason: str = ""

    @property
    def is_to_run(self) -> bool:
        return RUN in self.stages.values()


def outlook(ledger: Ledger) -> list[Outlook]:
    """The outlook of each cell of a plan, references included, in order; nothing is run or written."""
    return [_of(cell, ledger) for cell in ledger.plan.cells]


def _of(cell: PlannedCell, ledger: Ledger) -> Outlook:
    stages: dict[Stage, str] = {}
    reasons: list[str] = []
    for task in ledger.plan.of(cell):
        if (ending := ledger.ending(task)) is None:
            refusal = task.refusal or unavailable(cell.config) or ""
            stages[task.stage] = CANNOT_RUN if refusal else RUN
            reasons.append(refusal)
        elif ending.status is not None:
            stages[task.stage] = f"recorded {ending.status.value}"
            reasons.append(ending.reason)
    return Outlook(cell, stages, next(filter(None, reasons), ""))
