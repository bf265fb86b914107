"""Tasks as jobs of SLURM, through submitit: an array for all that ask for the same and may run at the same time."""

from __future__ import annotations

import contextlib
import io
import math
import shlex
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.schema import LauncherConfig
from slimbench.harness.launch import jobs
from slimbench.harness.launch.element import Element
from slimbench.harness.launch.local import LocalLauncher
from slimbench.harness.launch.resources import Resources, resources
from slimbench.harness.launch.watch import watch
from slimbench.harness.run.planning.ledger import Ledger
from slimbench.harness.run.planning.plan import FOLDER, Plan, PlannedCell, Task
from slimbench.harness.run.runner import Listener
from slimbench.harness.store.store import Store

_TIMEOUTS = 20
"""How often a job that reaches its time limit is queued again: each time it goes on where it stopped."""
_ARRAY = 1000  # elements; what SLURM allows unless its administrator says otherwise
_ASK_S = 10.0  # between two questions to the queue


@dataclass
class SlurmLauncher:
    """Submits a plan's open tasks and waits for them; interrupted, it leaves the jobs alone.

    Attributes:
        listener: Who is told what happens.
        seconds: No stage is started after these; None for no limit.
        on_done: Called for each cell that was asked for when all its stages have ended.
        detach: Do not wait.
    """

    listener: Listener
    seconds: float | None = None
    on_done: Callable[[PlannedCell], None] = lambda cell: None
    detach: bool = False

    @staticmethod
    def check(plan: Plan) -> None:
        """Raise `ConfigError` where nothing can be submitted."""
        try:
            import submitit  # noqa: F401
        except ImportError:
            raise ConfigError("launcher=slurm needs submitit: pip install 'slimbench[cluster]'") from None
        for program in ("sbatch", "srun", "squeue"):
            if shutil.which(program) is None:
                raise ConfigError(f"launcher=slurm: no {program} on this machine; start the sweep on a node that submits jobs")
        if plan.launcher.slots != 1:
            raise ConfigError("launcher.slots is for launcher=local; with slurm launcher.array=N says how many jobs run at a time")

    def launch(self, plan: Plan, store: Store) -> None:
        """As of `Launcher.launch`.

        Raises:
            ConfigError: SLURM refuses a job, or does not answer.
        """
        path = store.root / FOLDER / f"{plan.id}.json"
        self._record_refusals(plan, store)
        try:
            live = jobs.queue(plan)
            count = self._submit(plan, store, path, set(live))
        except jobs.Unanswered as error:
            raise ConfigError(f"launcher=slurm: {error}") from None
        if count or live:
            before = f", {len(live)} are there from before" if live else ""
            self.listener.note(f"{count} jobs submitted{before}; what they print: {jobs.logs(path)}/")
        if self.detach:
            self.listener.note(f"`slimbench status {store.root}` tells how it goes, `slimbench cancel {store.root}` ends the jobs")
            return
        try:
            watch(plan, store, self.listener, self.on_done, _Queue(plan, self.listener).left)
        except BaseException:
            self.listener.note(f"the jobs go on; `slimbench status {store.root}` tells how, `slimbench cancel {store.root}` ends them")
            raise

    def _record_refusals(self, plan: Plan, store: Store) -> None:
        """Record what no machine could run, which needs no job."""
        refused = {task.name for task in plan.tasks if task.refusal}
        if refused:
            LocalLauncher(self.listener).launch(plan.only(refused), store)

    def _submit(self, plan: Plan, store: Store, path: Path, live: set[str]) -> int:
        """Submit what is open and in no job yet; the number of jobs."""
        held = {task: entry.job for entry in jobs.submissions(path) if entry.job in live for task in entry.tasks}
        ledger = Ledger(plan, store)
        waiting = {task.name: task for task in ledger.open()}
        until = None if self.seconds is None else time.time() + self.seconds
        submitted: list[str] = []
        try:
            for group in _groups(plan, [task for name, task in waiting.items() if name not in held]):
                before = sorted({_array(held[name]) for task in group for name in task.after if name in held and name in waiting})
                executor = _executor(plan, resources(group[0], plan.launcher), jobs.logs(path), before)
                with contextlib.redirect_stderr(io.StringIO()):  # what sbatch says of an error stands in the exception
                    made = executor.submit_array([Element(str(path.resolve()), plan.id, [task.name], until) for task in group])
                entries = [jobs.Submission(job.job_id, [task.name], job.paths.stdout.name) for job, task in zip(made, group, strict=True)]
                jobs.add(path, entries)
                held |= {task: entry.job for entry in entries for task in entry.tasks}
                submitted += [entry.job for entry in entries]
        except (RuntimeError, subprocess.SubprocessError, OSError) as error:
            if submitted:
                subprocess.run(["scancel", *sorted(set(map(_array, submitted)))], check=False, capture_output=True)
            raise ConfigError(f"launcher=slurm: {_said(error)}") from error
        return len(submitted)


def _groups(plan: Plan, tasks: list[Task]) -> Iterator[list[Task]]:
    """The tasks of each array: those that ask for the same and stand on equally many others, what others stand on first."""
    depths: dict[str, int] = {}
    names = {task.name for task in tasks}

    def depth(task: Task) -> int:
        if task.name not in depths:
            depths[task.name] = max((depth(plan.by_name[name]) + 1 for name in task.after if name in names), default=0)
        return depths[task.name]

    arrays: dict[tuple[int, Resources], list[Task]] = defaultdict(list)
    for task in tasks:
        arrays[depth(task), resources(task, plan.launcher)].append(task)
    for _, group in sorted(arrays.items(), key=lambda array: array[0][0]):
        yield from (group[start : start + _ARRAY] for start in range(0, len(group), _ARRAY))


def _executor(plan: Plan, asked: Resources, logs: Path, after: list[str]) -> Any:
    """What submits an array.

    Args:
        after: Arrays that must have ended before, however they ended.
    """
    import submitit

    launcher: LauncherConfig = plan.launcher
    executor = submitit.SlurmExecutor(folder=logs, max_num_timeout=_TIMEOUTS, python=f"{shlex.quote(sys.executable)} -P")
    optional = {
        "partition": launcher.partition,
        "account": launcher.account,
        "qos": launcher.qos,
        "constraint": launcher.constraint,
        "cpus_per_task": asked.cpus,
        "mem": f"{math.ceil(asked.memory_gb * 1000)}M" if asked.memory_gb else None,
        "gpus_per_node": asked.cards or None,
        "dependency": "afterany:" + ":".join(after) if after else None,
        "array_parallelism": launcher.array or _ARRAY,
    }
    executor.update_parameters(
        job_name=jobs.name(plan),
        time=asked.minutes,
        signal_delay_s=min(90, asked.minutes * 15),
        stderr_to_stdout=True,
        srun_args=["--open-mode=append"],
        additional_parameters={"requeue": True, **launcher.extra},
        **{key: value for key, value in optional.items() if value is not None},
    )
    return executor


def _array(job: str) -> str:
    return job.partition("_")[0]


def _said(error: Exception) -> str:
    """The one line that tells why a job was refused: what sbatch says, where it said something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[-1] if lines else type(error).__name__)


class _Queue:
    """The queue as the wait asks it: seldom, and with a line where its answer has changed."""

    def __init__(self, plan: Plan, listener: Listener) -> None:
        self._plan, self._listener = plan, listener
        self._asked = 0.0
        self._left: int | None = None
        self._told = ""

    def left(self) -> int | None:
        """How many jobs wait or run; None where SLURM does not answer."""
        if time.monotonic() - self._asked >= _ASK_S:
            self._asked = time.monotonic()
            try:
                found = jobs.queue(self._plan)
                self._left, text = len(found), jobs.in_words(found.values())
            except jobs.Unanswered as error:
                self._left, text = None, f"{error}; asked again later"
            if text != self._told:
                self._told = text
                self._listener.note(text)
        return self._left
