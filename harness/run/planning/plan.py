"""A plan: cells frozen with their keys, the stages they ask for as tasks, and what must come before each. It is data.

`RESULTS/plans/<id>.json`. Run, status and exit code read the plan and the store, never the configuration again. The same cells give
the same id, so a command that is given again goes on with its plan.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, ValidationError

from slimbench import __version__
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.lock import LOCK
from slimbench.harness.config.parse import build_method
from slimbench.harness.config.schema import LauncherConfig, RunConfig
from slimbench.harness.run.cell import Cell, hardware_of
from slimbench.harness.run.planning import memory
from slimbench.harness.run.planning.obstacles import environment, impossible, obstacle
from slimbench.harness.run.trust import Distrusted, require_own_code
from slimbench.harness.schema.base import Schema
from slimbench.harness.schema.hardware import HardwareIdentity
from slimbench.harness.schema.identity import CellIdentity, Keys, Stage
from slimbench.harness.schema.record import SCHEMA_VERSION
from slimbench.harness.stages import models
from slimbench.harness.store.store import StoreError
from slimbench.util.files import write_atomically
from slimbench.util.hashing import hash_file, short_hash

FOLDER = "plans"
_PLACE: Any = {"cells": {"__all__": {"config": {"results"}}}}  # a results folder may be moved with its plans


class _Frozen(Schema):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskNeeds(_Frozen):
    """What a machine must have for a task.

    Attributes:
        memory_bytes: Of the device at the peak, as estimated (`memory.estimate`); None where the number of parameters is not known.
        environment: Name in `slimbench env list`; None for slimbench's own.
        modules: Import names that must be there.
        seconds: The wall-clock limit.
        cards: CUDA cards that the stage is spread over, if it runs on one.
    """

    device: str
    memory_bytes: int | None
    environment: str | None
    modules: list[str]
    seconds: float
    cards: int = 1


class Task(_Frozen):
    """A stage of a cell as work to be placed.

    Attributes:
        name: Stage and content key: equal names are equal work.
        cell: Index into the plan's cells; the first of those that share the work.
        after: Names of the tasks that must have ended before.
        refusal: Why it cannot run on the machine that planned it, or on any; its record then says so and nothing is started.
    """

    name: str
    cell: int
    stage: Stage
    after: list[str]
    needs: TaskNeeds
    refusal: str = ""


class PlannedCell(_Frozen):
    """A cell with its validated configuration and keys.

    Attributes:
        overrides: How the command line names it.
        stages: What is run of it.
        asked: False for a reference that is there only because others are compared with it.
    """

    config: RunConfig
    identity: CellIdentity
    overrides: list[str]
    stages: list[Stage]
    asked: bool

    @cached_property
    def cell(self) -> Cell:
        return Cell(self.config, self.identity, tuple(build_method(step) for step in self.config.pipeline), tuple(self.overrides))

    def hardware(self, stage: Stage) -> HardwareIdentity:
        """What a stage of this cell runs on, on this machine."""
        return hardware_of(self.config, stage)

    @property
    def label(self) -> str:
        return f"{self.identity.model} · {self.identity.pipeline}"


class Versions(_Frozen):
    """Of what planned: slimbench, its record schema, and the hash of the lock of all other versions."""

    slimbench: str = __version__
    record_schema: int = SCHEMA_VERSION
    lock: str = Field(default_factory=lambda: hash_file(LOCK)[:12])


class Plan(_Frozen):
    """Cells and tasks, in the order of preference in which they run; what was made after `created` is not made again."""

    created: str
    versions: Versions
    launcher: LauncherConfig
    cells: list[PlannedCell]
    tasks: list[Task]

    @cached_property
    def id(self) -> str:
        return short_hash(self.model_dump_json(exclude={"created": True, **_PLACE}))

    @cached_property
    def by_name(self) -> dict[str, Task]:
        return {task.name: task for task in self.tasks}

    def of(self, cell: PlannedCell) -> list[Task]:
        """The tasks of a cell, those that it shares with others included."""
        return [self.by_name[task_name(cell.identity, stage)] for stage in cell.stages]

    def only(self, names: Collection[str]) -> Plan:
        """The plan with no other tasks than these."""
        cells = [
            cell.model_copy(update={"stages": [stage for stage in cell.stages if task_name(cell.identity, stage) in names]})
            for cell in self.cells
        ]
        tasks = [task for task in self.tasks if task.name in names]
        return Plan(created=self.created, versions=self.versions, launcher=self.launcher, cells=cells, tasks=tasks)


def make_plan(cells: Iterable[Cell]) -> Plan:
    """The plan of some cells: each reference once and before what is compared with it, each stage that cells share once.

    A cell that no engine could measure is not compressed for it, and a cell that cannot be compressed needs no reference.
    """
    planned: list[PlannedCell] = []
    tasks: dict[str, Task] = {}
    places: dict[tuple[str, ...], int] = {}
    references: set[tuple[str, ...]] = set()

    def add(cell: Cell, refusals: dict[Stage, str], asked: bool) -> None:
        index = places.setdefault(_place(cell.identity.keys), len(planned))
        if index == len(planned):
            overrides = [o for o in cell.overrides if not o.startswith("results=")]
            planned.append(PlannedCell(config=cell.config, identity=cell.identity, overrides=overrides, stages=[*refusals], asked=asked))
        else:
            before = planned[index]
            stages = [stage for stage in Stage if stage in before.stages or stage in refusals]
            planned[index] = before.model_copy(update={"asked": before.asked or asked, "stages": stages})
        for stage, refusal in refusals.items():
            task = _task(cell, index, stage, refusal)
            tasks.setdefault(task.name, task)

    for cell in cells:
        refusals, reference = _refusals(cell), (*_place(cell.identity.reference), *cell.config.stages)
        if not cell.config.is_reference and reference not in references and not all(refusals.values()):
            references.add(reference)
            compared_with = cell.reference()
            add(compared_with, _refusals(compared_with), asked=False)
        add(cell, refusals, asked=True)
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    return Plan(
        created=created,
        versions=Versions(),
        launcher=planned[0].config.launcher,
        cells=planned,
        tasks=list(tasks.values()),
    )


def write(plan: Plan, results: Path) -> Path:
    """Write a plan into its results folder.

    Raises:
        StoreError: The folder cannot be written.
    """
    path = results / FOLDER / f"{plan.id}.json"
    try:
        write_atomically(path, plan.model_dump_json(exclude=_PLACE).encode())
    except OSError as error:
        raise StoreError(f"cannot write into the results folder {results}: {error.strerror or error}") from error
    return path


def read(path: Path) -> Plan:
    """The plan in a file.

    Raises:
        ConfigError: It cannot be read, or is none.
    """
    try:
        return Plan.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read the plan {path}: {error.strerror or error}") from error
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        raise ConfigError(f"{path} is no plan of slimbench {__version__}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}") from error


def read_safely(path: Path, trusted: bool) -> Plan:
    """The plan in a file that may be another's, held against this installation: no class or loader that only the file names is imported.

    Args:
        trusted: Allow code that its models and folders of tasks bring along, which is run with them.

    Raises:
        ConfigError: It cannot be read, is none, names other code than this installation has, or asks for trust that it has not.
    """
    plan = read(path)
    try:
        require_own_code((cell.config for cell in plan.cells), trusted)
    except Distrusted as error:
        raise ConfigError(f"{path}: {error}") from error
    return plan


def is_own(plan: Plan) -> bool:
    """Whether this installation has all the classes and loaders that a plan names."""
    try:
        require_own_code((cell.config for cell in plan.cells), trusted=True)
    except (Distrusted, ConfigError):
        return False
    return True


def _refusals(cell: Cell) -> dict[Stage, str]:
    """The stages of a cell that make sense, each with why it cannot run where it is to run, empty where it can.

    None comes after a compression that is refused, and what cannot be measured needs no compression. What the machine that plans lacks
    counts only where it also runs the stages.
    """
    reason = obstacle if cell.config.launcher.is_local else impossible
    refusals = {stage: reason(cell, stage) or "" for stage in cell.stages()}
    if refusals[Stage.COMPRESS]:
        return {Stage.COMPRESS: refusals[Stage.COMPRESS]}
    measured: dict[Stage, str] = {stage: refusal for stage, refusal in refusals.items() if stage != Stage.COMPRESS}
    return measured if measured and all(measured.values()) else refusals


def _place(keys: Keys) -> tuple[str, ...]:
    return keys.compress, keys.quality, keys.speed


def _task(cell: Cell, index: int, stage: Stage, refusal: str) -> Task:
    config, reference = cell.config, cell.identity.reference
    after: list[str] = []
    if stage is not Stage.COMPRESS and not refusal:
        after = [task_name(cell.identity, Stage.COMPRESS)]
        if not config.is_reference:
            after += [f"{kind.value}-{reference.of(kind)}" for kind in (Stage.COMPRESS, stage)]
    modules = {name for method in cell.methods for name in method.needs.modules} if stage is Stage.COMPRESS else set(config.engine.modules)
    need = memory.estimate(config, cell.methods, stage, models.known_shape(config.model))
    needs = TaskNeeds(
        device=config.device.compress if stage is Stage.COMPRESS else config.device.name,
        memory_bytes=need.bytes if need else None,
        environment=environment(cell, stage),
        modules=sorted(modules),
        seconds=config.limits.wall_s,
        cards=1 if stage is Stage.COMPRESS else config.device.cards,
    )
    return Task(name=task_name(cell.identity, stage), cell=index, stage=stage, after=after, needs=needs, refusal=refusal)


def task_name(cell: CellIdentity, stage: Stage) -> str:
    return f"{stage.value}-{cell.keys.of(stage)}"
