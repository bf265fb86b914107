"""`slimbench status`: what plans have come to, and who is at them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimbench.harness.cli.exit_codes import of
from slimbench.harness.cli.terminal import console, print_table
from slimbench.harness.config.errors import ConfigError

if TYPE_CHECKING:
    from slimbench.harness.run.planning.ledger import Ledger
    from slimbench.harness.run.planning.plan import Plan

_SHOWN = 20  # failures of a plan that are named, and jobs
_COLUMNS = ("plan", "made", "cells", "done", "running", "queued", "to run", "transient", "failed", "unsupported", "left", "exit code")

Place = Annotated[Path, typer.Argument(metavar="[RESULTS|PLAN]", help="A results folder, or one of the files below its plans/.")]


def status(
    place: Place = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """What is done, running, queued, to run and failed of each plan of a results folder, and how long the rest takes. Nothing is run."""
    facts = [_facts(path, plan) for path, plan in plan_files(place)]
    if as_json:
        print(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    print_table("terminal", {name: name for name in _COLUMNS}, facts)
    for line in _details(facts[-1]):
        console().print(line)


def plan_files(place: Path) -> list[tuple[Path, Plan]]:
    """The plans of a results folder, the oldest first, or the one in a file. One that cannot be read is left out with a line.

    Raises:
        ConfigError: There is none.
    """
    from slimbench.harness.run.planning import plan as plans

    if place.is_file():
        return [(place, plans.read(place))]
    found = []
    for path in sorted((place / plans.FOLDER).glob("*.json"), key=lambda path: path.stat().st_mtime):
        try:
            found.append((path, plans.read(path)))
        except ConfigError as error:
            console(stderr=True).print(f"left out: {error}")
    if not found:
        raise ConfigError(f"no plan in '{place}': `slimbench sweep` and `slimbench run` write one into their results folder")
    return found


def _facts(path: Path, plan: Plan) -> dict[str, Any]:
    from slimbench.harness.launch import jobs
    from slimbench.harness.run.planning.estimates import Estimates
    from slimbench.harness.run.planning.ledger import Ledger, State
    from slimbench.harness.run.planning.plan import is_own
    from slimbench.harness.run.planning.progress import in_words
    from slimbench.harness.store.store import Store

    ledger = Ledger(plan, Store(path.parent.parent), with_code=is_own(plan))  # what only a file names is not imported
    counts, open_tasks = ledger.counts(), list(ledger.open())
    seconds = Estimates(ledger.store).total(plan, open_tasks)
    running = _running(ledger)
    queued, unanswered = _queued(path, plan)
    waiting = {task for job in queued if job["state"] == "PENDING" for task in job["tasks"]}
    failures = {
        f"{plan.cells[task.cell].label} {task.stage}": ending.reason
        for task in plan.tasks
        if (ending := ledger.ending(task)) and ending.state is State.FAILED
    }
    return {
        "plan": plan.id,
        "made": plan.created,
        "launcher": plan.launcher.name,
        "cells": len(plan.cells),
        "tasks": len(plan.tasks),
        "done": counts[State.OK] + counts[State.NEEDLESS],
        "running": len(running),
        "queued": sum(task.name in waiting and task.name not in running for task in open_tasks),
        "to run": len(open_tasks),
        "transient": counts[State.TRANSIENT],
        "failed": counts[State.FAILED],
        "unsupported": counts[State.UNSUPPORTED],
        "left": "" if not open_tasks else in_words(seconds) if seconds is not None else "no estimate yet",
        "seconds left": seconds if open_tasks else 0,
        "exit code": int(of(ledger)),
        "failures": failures,
        "tasks running": list(running.values()),
        "jobs": queued,
        "jobs unanswered": unanswered,
        "logs": str(jobs.logs(path)) if jobs.submissions(path) else "",
    }


def _running(ledger: Ledger) -> dict[str, dict[str, Any]]:
    """Who is at which open task of a plan."""
    running = {}
    held = ledger.store.holders()
    for task in ledger.open():
        if (owner := held.get(task.name)) is not None:
            label = f"{ledger.plan.cells[task.cell].label} {task.stage}"
            running[task.name] = {"task": label, "host": owner.host, "pid": owner.pid, "job": owner.job, "since": owner.started}
    return running


def _queued(path: Path, plan: Plan) -> tuple[list[dict[str, Any]], str]:
    """The jobs of a plan that wait or run, with their tasks, and why they are not known where they are not."""
    from slimbench.harness.launch import jobs

    submitted = {entry.job: entry for entry in jobs.submissions(path)}
    if not submitted:
        return [], ""
    try:
        found = jobs.queue(plan)
    except jobs.Unanswered as error:
        return [], str(error)
    return [
        {"job": job.job, "state": job.state, "reason": job.reason, "node": job.node}
        | ({"tasks": entry.tasks, "log": entry.log} if (entry := submitted.get(job.job)) else {"tasks": [], "log": ""})
        for job in found.values()
    ], ""


def _details(facts: dict[str, Any]) -> Iterator[str]:
    """What stands below the table: what runs, what waits, what failed and where the logs are, each cut short."""
    for running in facts["tasks running"][:_SHOWN]:
        at = f"job {running['job']} on {running['host']}" if running["job"] else f"{running['host']}, process {running['pid']}"
        yield f"{running['task']}: running since {running['since']}, {at}"
    reasons = sorted({job["reason"] for job in facts["jobs"] if job["state"] == "PENDING"})
    if reasons:
        yield f"jobs wait for: {', '.join(reasons)}"
    if facts["jobs unanswered"]:
        yield f"jobs are not known: {facts['jobs unanswered']}"
    for name, reason in list(facts["failures"].items())[:_SHOWN]:
        yield f"{name}: {reason}"
    if facts["logs"]:
        yield f"what jobs printed: {facts['logs']}/"
