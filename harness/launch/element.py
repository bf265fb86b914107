"""What one job of a cluster runs: some tasks of a plan, until it is told to stop; then it has itself queued again."""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimbench.harness.launch import signals


class Incomplete(RuntimeError):
    """A job ends with work left that no one is at; the message is one line."""


@dataclass(frozen=True)
class Element:
    """One element of a job array, as submitit calls it. What it was cut off in goes on where it stopped when it is called again.

    Attributes:
        path: The plan file.
        plan: Its id: a file that came to hold another plan is not run.
        names: Of the tasks.
        until: No stage is started after this time, in seconds since 1970; None for no limit.
    """

    path: str
    plan: str
    names: list[str] = field(default_factory=list)
    until: float | None = None

    def __call__(self) -> dict[str, str]:
        """How each task ended.

        Raises:
            Incomplete: A task is left, by the fault of this machine.
        """
        seconds = None if self.until is None else max(self.until - time.time(), 0.0)
        try:
            with signals.raised():
                from rich.console import Console

                from slimbench.harness.launch.drain import drain

                console = Console(file=sys.stderr, width=160, markup=False, emoji=False, highlight=False)
                ledger = drain(Path(self.path), self.names, console, seconds, trusted=True, expected=self.plan)
        except signals.Stopped as stop:
            _queue_again(stop.name)
        ends = {task.name: ledger.state(task).value for task in ledger.plan.tasks}
        if (left := [task.name for task in ledger.open()]) and seconds is None:
            raise Incomplete(f"{len(left)} of {len(ends)} tasks are left, of which {left[0]} is {ends[left[0]]}")
        return ends

    def checkpoint(self) -> Any:
        """What submitit submits in place of this job: the same again, as what is recorded is not run again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _queue_again(name: str) -> None:
    """End the job after a signal. SIGTERM comes from SLURM, which knows whether the job is to run again; others are a warning."""
    from submitit.core.job_environment import JobEnvironment

    if name != "SIGTERM":
        signal.raise_signal(signal.Signals[f"SIG{JobEnvironment.USR_SIG}"])  # submitit's own handler queues the job again and ends it
    raise SystemExit(75)
