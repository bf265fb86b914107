"""A campaign in pieces: each begins with some of its cells measured again, and is not joined to the rest if they are not what they were."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import TYPE_CHECKING

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.schema.base import Schema
from slimbench.harness.schema.identity import Stage, Status
from slimbench.util.files import write_atomically
from slimbench.util.text import nearest

if TYPE_CHECKING:
    from rich.console import Console

    from slimbench.harness.run.planning.plan import Plan, PlannedCell
    from slimbench.harness.store.store import Store

FOLDER = "pieces"


class Anchor(Schema):
    """A stage that was measured again: how it stands to its record, and the figures of both in one line."""

    cell: str
    stage: Stage
    key: str
    outcome: str
    detail: str


class Piece(Schema):
    """What one piece of a campaign began with. `RESULTS/pieces/<started>.json`."""

    started: str
    hardware: str
    commit: str | None
    anchors: list[Anchor]


class Drifted(Exception):
    """An anchor has left its interval; the message is one line."""


def hold(plan: Plan, names: Sequence[str], store: Store, console: Console) -> Piece:
    """Measure again what is recorded of the anchors, from the model on, and write down how it compares.

    An anchor that has no record yet is measured with the other cells, and says nothing in its first piece.

    Args:
        plan: Of the campaign.
        names: Anchors, as pipelines of cells of the plan; of several draws the first.
        store: Of the campaign's records.

    Raises:
        ConfigError: No cell of the plan has such a pipeline, or its stages do not run on this machine.
        Drifted: An anchor does not reproduce: perplexity within 0.5 %, 98 % of the answers, the interval of a speed.
    """
    from slimbench.harness.measure.hardware import hardware
    from slimbench.harness.run import audit, provenance
    from slimbench.harness.run.planning.ledger import recorded

    if not plan.launcher.is_local:
        raise ConfigError(f"--anchors: they are measured on this machine, and launcher={plan.launcher.name} measures on others")
    cells = [_cell(plan, name) for name in names]
    found = [(cell, record) for cell in cells for stage in cell.stages if (record := recorded(store, cell, stage))]
    repeats = [audit.Repeat(record, cell.cell) for cell, record in found if record.status is Status.OK]
    started = datetime.datetime.now(datetime.UTC)
    verdicts = audit.repeat(repeats, store.root, console)
    anchors = [
        Anchor(cell=repeat.cell.label, stage=repeat.record.stage, key=repeat.record.key, outcome=verdict.outcome, detail=verdict.detail)
        for repeat, verdict in zip(repeats, verdicts, strict=True)
    ]
    commit = provenance.commit()
    piece = Piece(
        started=started.isoformat(timespec="seconds"),
        hardware=hardware().identity(plan.cells[0].config.device.name, threads=plan.cells[0].config.device.threads).label,
        commit=commit["commit"] if commit else None,
        anchors=anchors,
    )
    if anchors:
        write_atomically(store.root / FOLDER / f"{started:%Y%m%dT%H%M%SZ}.json", piece.model_dump_json(indent=1).encode() + b"\n")
    for anchor, verdict in zip(anchors, verdicts, strict=True):
        console.print(f"anchor {anchor.cell}, {anchor.stage}: {anchor.outcome}; {anchor.detail}", soft_wrap=True)
        if verdict.outcome not in (audit.Outcome.EQUAL, audit.Outcome.WITHIN):
            raise Drifted(
                f"{anchor.cell}, {anchor.stage}: {anchor.outcome}; {anchor.detail}. "
                f"What is measured now does not belong beside the records of {store.root}; give another results="
            )
    return piece


def _cell(plan: Plan, name: str) -> PlannedCell:
    known = {cell.identity.pipeline: cell for cell in reversed(plan.cells)}
    if name not in known:
        raise ConfigError(f"--anchors: no cell of this sweep is {name}{nearest(name, list(known))}")
    return known[name]
