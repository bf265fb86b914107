"""What came of each method on each model, for listings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.record import Record
from slimbench.leaderboard.rows.steps import names


def outcomes(records: Iterable[Record]) -> dict[str, dict[str, str]]:
    """What came of each method on each model: name → model → text. Only measured pipelines of the method alone count, under any settings.

    `ok` means that each stage that was tried has ended well at least once, on whichever engine, suite or machine; else the first
    stage that never did is named with its status.
    """
    found: dict[tuple[str, str], dict[Stage, list[Status]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        measured = record.imported is None and record.status is not Status.TRANSIENT
        if len(record.cell.steps) == 1 and measured and not record.foreign:
            found[names(record.cell)[0], record.cell.model][record.stage].append(record.status)
    texts: dict[str, dict[str, str]] = defaultdict(dict)
    for (name, model), stages in found.items():
        bad = [f"{stage.value} {stages[stage][-1].value}" for stage in Stage if stage in stages and Status.OK not in stages[stage]]
        texts[name][model] = bad[0] if bad else "ok"
    return texts
