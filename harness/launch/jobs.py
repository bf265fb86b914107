"""The jobs of SLURM that were submitted for a plan: which job runs which task, where it stands, and how it is ended.

`RESULTS/plans/<id>/logs/jobs.json` is data that is not trusted: a job is only ever asked about or ended together with its name, which the
plan gives it, so that no file can point at other jobs.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slimbench.harness.run.planning.plan import Plan
from slimbench.util.files import write_atomically

_ID = re.compile(r"(\d+)(?:_(\d+))?")
_TIMEOUT_S = 60.0
_OVER = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
_OVER |= {"RECONFIG_FAIL", "REVOKED", "TIMEOUT"}
"""States from which a job does not come back. One that is being queued again is in none that `squeue` shows by itself."""


class Unanswered(Exception):
    """SLURM does not answer; the message is one line."""


@dataclass(frozen=True)
class Submission:
    """A job as it was submitted.

    Attributes:
        job: `NUMBER` or, of an array, `NUMBER_INDEX`.
        tasks: Names of the tasks that it was submitted for.
        log: Name of the file in `logs` that has what it prints.
    """

    job: str
    tasks: list[str]
    log: str


@dataclass(frozen=True)
class Queued:
    """A job that waits or runs.

    Attributes:
        state: `PENDING`, `RUNNING` and so on, as SLURM says it.
        reason: Why it waits.
        node: Where it runs.
    """

    job: str
    state: str
    reason: str
    node: str


def name(plan: Plan) -> str:
    """What the jobs of a plan are called."""
    return f"slimbench-{plan.id}"


def logs(path: Path) -> Path:
    """The folder of what the jobs of a plan file print, and of their list."""
    return path.with_suffix("") / "logs"


def submissions(path: Path) -> list[Submission]:
    """The jobs that were submitted for a plan file, the oldest first; none where there is no list that can be read."""
    try:
        listed = json.loads((logs(path) / "jobs.json").read_bytes())["jobs"]
        found = [Submission(str(entry["job"]), [str(task) for task in entry["tasks"]], str(entry["log"])) for entry in listed]
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return [submission for submission in found if _ID.fullmatch(submission.job) and "/" not in submission.log]


def add(path: Path, new: list[Submission]) -> None:
    """Write further jobs into the list of a plan file."""
    listed: list[dict[str, Any]] = [asdict(submission) for submission in (*submissions(path), *new)]
    logs(path).mkdir(parents=True, exist_ok=True)
    write_atomically(logs(path) / "jobs.json", json.dumps({"jobs": listed}, indent=1).encode())


def queue(plan: Plan) -> dict[str, Queued]:
    """The jobs of a plan that wait or run, by their id.

    Raises:
        Unanswered: There is no SLURM here, or it does not answer.
    """
    asked = _ask("squeue", "--noheader", "--array", "--states=all", f"--name={name(plan)}", "--format=%i|%T|%r|%N")
    jobs = [Queued(*line.strip().split("|", 3)) for line in asked.splitlines() if line.count("|") >= 3]
    return {job.job: job for job in jobs if _ID.fullmatch(job.job) and job.state not in _OVER}


def in_words(found: Iterable[Queued]) -> str:
    """How many jobs there are of each state, and why those that wait do."""
    states = Counter(f"{job.state.lower()} ({job.reason})" if job.state == "PENDING" else job.state.lower() for job in found)
    return "jobs: " + (", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none")


def cancel(plan: Plan) -> list[str]:
    """End the jobs of a plan that wait or run; their ids.

    Raises:
        Unanswered: There is no SLURM here, or it does not answer.
    """
    found = sorted(queue(plan))
    if found:
        _ask("scancel", f"--name={name(plan)}", *sorted({job.partition("_")[0] for job in found}))
    return found


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise Unanswered(f"no {command[0]} on this machine") from None
    except subprocess.TimeoutExpired:
        raise Unanswered(f"{command[0]} does not answer") from None
    if done.returncode:
        raise Unanswered(next(reversed(done.stderr.strip().splitlines()), f"{command[0]} fails and says nothing"))
    return done.stdout
