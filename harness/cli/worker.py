"""`slimbench worker`: lend a hand with a plan, from whatever starts it: a job of Kubernetes, a loop over ssh, a second terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimbench.harness.cli.exit_codes import ExitCode, of
from slimbench.harness.cli.run import StopAfter, seconds_of, track
from slimbench.harness.cli.terminal import console, fail


def worker(
    plan: Annotated[Path, typer.Argument(help="A file below plans/ of a results folder.")],
    stop_after: StopAfter = None,
    name: Annotated[str, typer.Option(help="Only tasks of such names, such as 'speed-*', and what they stand on.")] = "*",
    trust: Annotated[bool, typer.Option("--trust", help="Allow code that models and folders of tasks of the plan bring along.")] = False,
) -> None:
    """Run what is open of a plan: what is recorded is skipped, what others are at is looked at again until all has ended."""
    seconds = seconds_of(stop_after)
    from slimbench.harness.launch import drain, signals
    from slimbench.harness.launch.sweep import require_supplies
    from slimbench.harness.run.planning import plan as plans
    from slimbench.harness.run.planning.ledger import Ledger
    from slimbench.harness.store.store import Store

    asked, store = plans.read_safely(plan, trust), Store(plan.parent.parent)
    names = drain.matching(asked, name)
    require_supplies(Ledger(asked, store))
    try:
        with signals.raised():
            ledger = drain.drain(plan, names, console(stderr=True), seconds, trust, on_done=lambda cell: track(cell, store))
    except signals.Stopped as stopped:
        fail(f"stopped by {stopped.name}; the same command goes on where it stopped", ExitCode.STOPPED)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on where it stopped", ExitCode.INTERRUPTED)
    raise typer.Exit(of(ledger))
