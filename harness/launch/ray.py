"""Tasks of a Ray cluster, or of Ray on this machine: each asks for what its stage needs, and waits for what it stands on."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.launch import signals
from slimbench.harness.launch.local import LocalLauncher
from slimbench.harness.launch.resources import Resources, resources
from slimbench.harness.launch.watch import watch
from slimbench.harness.run.planning.ledger import Ledger
from slimbench.harness.run.planning.plan import FOLDER, Plan, PlannedCell, Task
from slimbench.harness.run.runner import Listener
from slimbench.harness.store.store import Store

_CRASHES = 3
"""How often Ray starts a task again whose process or node was lost: each time it goes on where it stopped."""
_STOP_S = 30.0  # for what runs to be recorded


@dataclass
class RayLauncher:
    """Runs a plan's open tasks where Ray places them, and ends them when it is interrupted. Attributes as of `SlurmLauncher`."""

    listener: Listener
    seconds: float | None = None
    on_done: Callable[[PlannedCell], None] = lambda cell: None
    detach: bool = False

    @staticmethod
    def check(plan: Plan) -> None:
        """Raise `ConfigError` where there is no Ray, or where it is asked for what only other launchers do."""
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("launcher=ray needs ray: pip install 'slimbench[cluster]'")
        if plan.launcher.slots != 1:
            raise ConfigError("launcher.slots is for launcher=local; Ray runs as many stages at a time as there is room for")

    def launch(self, plan: Plan, store: Store) -> None:
        """As of `Launcher.launch`.

        Raises:
            ConfigError: No node has what a task asks for, or a node cannot run the plan.
        """
        if self.detach:
            raise ConfigError(
                "--detach: Ray ends the tasks of a program that leaves; give the whole command to `ray job submit --no-wait --`"
            )
        self._record_refusals(plan, store)
        with _connected() as ray:
            needs = {task.name: _needs(task, plan, ray.nodes()) for task in Ledger(plan, store).open()}
            tasks = _Tasks(ray, self._submit(ray, plan, store, needs))
            self.listener.note(
                f"{len(needs)} tasks given to Ray; what they print: `ray logs`, or /tmp/ray/session_latest/logs on their node"
            )
            try:
                watch(plan, store, self.listener, self.on_done, tasks.left)
            except BaseException:
                tasks.cancel()
                raise

    def _record_refusals(self, plan: Plan, store: Store) -> None:
        refused = {task.name for task in plan.tasks if task.refusal}
        if refused:
            LocalLauncher(self.listener).launch(plan.only(refused), store)

    def _submit(self, ray: Any, plan: Plan, store: Store, needs: dict[str, Resources]) -> list[Any]:
        path = (store.root / FOLDER / f"{plan.id}.json").resolve()
        until = None if self.seconds is None else time.time() + self.seconds
        remote = ray.remote(run)
        refs: dict[str, Any] = {}
        for name, asked in needs.items():
            options = {"num_cpus": asked.cpus, "num_gpus": asked.cards, "max_retries": _CRASHES, "name": name}
            if asked.memory_gb:
                options["memory"] = int(asked.memory_gb * 1e9)
            before = [refs[other] for other in plan.by_name[name].after if other in refs]
            refs[name] = remote.options(**options).remote(str(path), plan.id, name, asked.cards, until, *before)
        return list(refs.values())


def run(path: str, plan: str, name: str, cards: int, until: float | None, *before: str) -> str:
    """What a task is: a stage with what it stands on, by its name in the plan file. Runs on the node.

    Args:
        plan: Id of the plan that is in the file.
        cards: CUDA cards that Ray gave it.
        until: No stage is started after this time, in seconds since 1970.
        before: Results of the tasks that Ray had to wait for.

    Returns:
        Why this node cannot run it, in one line; empty where it can. How the stage ended stands in the store.
    """
    from rich.console import Console

    from slimbench.harness.launch.drain import drain
    from slimbench.harness.measure.hardware import hardware

    here = f"node {socket.gethostname()}"
    if not Path(path).is_file():
        return f"{here} has no {path}: results= must name a folder that all nodes share"
    if (usable := len(hardware().gpus)) < cards:
        return f"{here}: Ray gave {name} {cards} CUDA card{'s' * (cards > 1)}, of which torch can use {usable}"
    seconds = None if until is None else max(until - time.time(), 0.0)
    try:
        with signals.raised():
            drain(Path(path), [name], Console(file=sys.stderr, width=160, markup=False), seconds, trusted=True, expected=plan)
    except ConfigError as error:
        return f"{here}: {error}"
    except signals.Stopped:
        os._exit(75)  # to Ray a lost process: it is started again, here or on another node
    return ""


class _Tasks:
    """What was given to Ray."""

    def __init__(self, ray: Any, refs: list[Any]) -> None:
        self._ray, self._open = ray, refs

    def left(self) -> int:
        """How many wait or run.

        Raises:
            ConfigError: A node cannot run what it was given.
        """
        if self._open:
            ended, self._open = self._ray.wait(self._open, num_returns=len(self._open), timeout=0)
            for ref in ended:
                try:
                    reason = self._ray.get(ref)
                except Exception as error:
                    reason = f"a task was lost: {' '.join(str(error).split())}"
                if reason:
                    raise ConfigError(f"launcher=ray: {reason}")
        return len(self._open)

    def cancel(self) -> None:
        """End what waits and what runs, and give it time to be recorded."""
        for ref in reversed(self._open):  # what waits for others first, so that it is not started meanwhile
            self._ray.cancel(ref)
        self._ray.wait(self._open, num_returns=len(self._open), timeout=_STOP_S)


@contextlib.contextmanager
def _connected() -> Iterator[Any]:
    """Ray on the cluster that `RAY_ADDRESS` names, or on this machine alone."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    address = os.environ.get("RAY_ADDRESS") or "local"
    own: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="slimbench", **own)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"launcher=ray: no Ray cluster at {address}: {' '.join(str(error).split())}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _needs(task: Task, plan: Plan, nodes: list[dict[str, Any]]) -> Resources:
    """What a task asks Ray for. On CPUs it has a whole node unless `launcher.cpus` says how many: others would disturb its times.

    Raises:
        ConfigError: No node has it.
    """
    asked = resources(task, plan.launcher)
    rooms = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU")]
    if not rooms:
        raise ConfigError("launcher=ray: the cluster has no node with CPUs")
    asked = replace(asked, cpus=asked.cpus or (1 if asked.cards else int(min(room["CPU"] for room in rooms))))
    needs = {"CPU": asked.cpus, "GPU": asked.cards, "memory": (asked.memory_gb or 0) * 1e9}
    if any(all(room.get(kind, 0) >= amount for kind, amount in needs.items()) for room in rooms):
        return asked
    most = max(rooms, key=lambda room: room.get("GPU", 0))
    has = f"{most['CPU']:.0f} CPUs, {most.get('GPU', 0):.0f} CUDA cards and {most.get('memory', 0) / 1e9:.0f} GB"
    hint = "; for stages on CPUs give launcher.cards=0" if asked.cards and not most.get("GPU") else ""
    memory = f" and {asked.memory_gb:g} GB" if asked.memory_gb else ""
    raise ConfigError(f"launcher=ray: {task.name} needs {asked.cpus} CPUs, {asked.cards} CUDA cards{memory}; the best node has {has}{hint}")
