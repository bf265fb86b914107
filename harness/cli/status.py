"""`slimbench status`: what plans have come to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimbench.harness.cli.exit_codes import of
from slimbench.harness.cli.terminal import console, print_table
from slimbench.harness.config.errors import ConfigError

if TYPE_CHECKING:
    from slimbench.harness.run.planning.ledger import Ledger

_SHOWN = 20  # failures of a plan that are named


def status(
    place: Annotated[Path, typer.Argument(metavar="[RESULTS|PLAN]", help="A results folder, or one of the files below its plans/.")] = Path(
        "runs"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """What is done, to run and failed of each plan of a results folder, and how long the rest will take. Nothing is run."""
    from slimbench.harness.run.planning import plan as plans
    from slimbench.harness.run.planning.ledger import Ledger
    from slimbench.harness.store.store import Store

    paths = [place] if place.is_file() else sorted((place / plans.FOLDER).glob("*.json"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise ConfigError(f"no plan in '{place}': `slimbench sweep` and `slimbench run` write one into their results folder")
    facts = []
    for path in paths:
        try:
            facts.append(_facts(Ledger(plans.read_safely(path, trusted=True), Store(path.parent.parent))))
        except ConfigError as error:
            if place.is_file():
                raise
            console(stderr=True).print(f"left out: {error}")
    if as_json:
        print(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    columns = ("plan", "made", "cells", "done", "to run", "failed", "unsupported", "left", "exit code")
    if not facts:
        return
    print_table("terminal", {name: name for name in columns}, facts)
    for name, reason in list(facts[-1]["failures"].items())[:_SHOWN]:
        console().print(f"{name}: {reason}")


def _facts(ledger: Ledger) -> dict[str, Any]:
    from slimbench.harness.run.planning.estimates import Estimates
    from slimbench.harness.run.planning.ledger import State
    from slimbench.harness.run.planning.progress import in_words

    plan, counts = ledger.plan, ledger.counts()
    left = counts[State.OPEN] + counts[State.TRANSIENT]
    seconds = Estimates(ledger.store).total(plan, ledger.open())
    failures = {
        f"{plan.cells[task.cell].label} {task.stage}": ending.reason
        for task in plan.tasks
        if (ending := ledger.ending(task)) and ending.state is State.FAILED
    }
    return {
        "plan": plan.id,
        "made": plan.created,
        "cells": len(plan.cells),
        "tasks": len(plan.tasks),
        "done": counts[State.OK] + counts[State.NEEDLESS],
        "to run": left,
        "failed": counts[State.FAILED],
        "unsupported": counts[State.UNSUPPORTED],
        "left": "" if not left else in_words(seconds) if seconds is not None else "no estimate yet",
        "seconds left": seconds if left else 0,
        "exit code": int(of(ledger)),
        "failures": failures,
    }
