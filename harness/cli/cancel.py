"""`slimbench cancel`: end the jobs that were submitted for plans."""

from __future__ import annotations

from pathlib import Path

import typer

from slimbench.harness.cli.status import Place, plan_files
from slimbench.harness.cli.terminal import fail


def cancel(place: Place = Path("runs")) -> None:
    """End the jobs of SLURM that wait or run for the plans of a results folder; the same sweep goes on with what is not recorded."""
    from slimbench.harness.launch import jobs

    for path, plan in plan_files(place):
        try:
            cancelled = jobs.cancel(plan)
        except jobs.Unanswered as error:
            fail(f"nothing was cancelled: {error}", 1)
        print(f"plan {plan.id}: {f'cancelled {len(cancelled)} jobs: ' + ' '.join(cancelled) if cancelled else 'no jobs wait or run'}")
        if cancelled:
            typer.echo(f"what they printed: {jobs.logs(path)}/")
