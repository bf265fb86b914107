"""A resolved configuration becomes a cell: its words for the board and the content keys of its three stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.parse import build_method, describe
from slimbench.harness.config.registry import step_label
from slimbench.harness.config.schema import RunConfig, StepConfig
from slimbench.harness.measure.hardware import hardware
from slimbench.harness.run import hub, identity, public
from slimbench.harness.schema.hardware import HardwareIdentity
from slimbench.harness.schema.identity import CellIdentity, Stage
from slimbench.harness.stages import calibration_text
from slimbench.harness.stages.parts import parts
from slimbench.tasks import zeroshot
from slimbench.tasks.errors import DataError


@dataclass(frozen=True)
class Cell:
    """One row of the board, before it is measured.

    Attributes:
        config: The validated configuration, with `device.name`, `device.compress` and the revision of a hub model resolved.
        identity: What its records say about it.
        methods: The method objects of the pipeline, in order.
        overrides: The Hydra overrides that name this cell on the command line.
    """

    config: RunConfig
    identity: CellIdentity
    methods: tuple[Any, ...]
    overrides: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.identity.model} · {self.identity.pipeline}"

    @property
    def command(self) -> str:
        import shlex

        return shlex.join(["slimbench", "run", *public.overrides(self.overrides)])

    def hardware(self, stage: Stage) -> HardwareIdentity:
        """What a stage of this cell runs on, on this machine."""
        return hardware_of(self.config, stage)

    def recorded_config(self) -> dict[str, Any]:
        """The configuration as records have it: methods and engine by name and version; no folder of results, no path of a class."""
        config = self.config.model_dump(mode="json", exclude={"results", "launcher"})
        pipeline = [describe(step) for step in self.config.pipeline]
        return config | {"pipeline": pipeline, "reference": describe(self.config.reference), "engine": identity.engine(self.config)}

    def prefix_key(self, steps: int) -> str:
        """Compress key of the cell whose pipeline is the first so many steps of this one."""
        return self._key(self.config.pipeline[:steps])

    def prefix_keys(self) -> list[str]:
        """Compress keys of the cells whose artefacts are made on the way to that of this one, the first one first."""
        return [self._key(part.pipeline) for part in parts(self.config.pipeline)[:-1]]

    def _key(self, pipeline: Sequence[StepConfig]) -> str:
        return make_cell(self.config.model_copy(update={"pipeline": list(pipeline)})).identity.keys.compress

    def stages(self) -> list[Stage]:
        """The stages that are asked for and make sense: random weights have no quality."""
        wanted = [Stage.COMPRESS, *(stage for stage in (Stage.QUALITY, Stage.SPEED) if stage in self.config.stages)]
        return [stage for stage in wanted if not (self.config.model.is_random and stage is Stage.QUALITY)]

    def reference(self) -> Cell:
        """The dense cell with which this one is compared."""
        kept = [o for o in self.overrides if not o.lstrip("+~").startswith(("method=", "method.", "settings."))]
        return make_cell(self.config.as_reference(), (*kept, f"method={self.config.reference.name}"))


def hardware_of(config: RunConfig, stage: Stage) -> HardwareIdentity:
    """What a stage runs on, on this machine."""
    device = config.device
    if stage is Stage.COMPRESS:
        return hardware().identity(device.compress, device.index, device.threads)
    return hardware().identity(device.name, device.index, device.threads, device.cards)


def make_cell(config: RunConfig, overrides: tuple[str, ...] = ()) -> Cell:
    """Resolve devices and revision, build the methods and compute the task keys. Nothing but an unresolved device depends on this machine.

    Raises:
        ConfigError: The configuration names something that does not exist.
    """
    methods = tuple(build_method(step) for step in config.pipeline)
    config = _resolve_revision(_resolve_device(config))
    placed = _on_its_device(config)
    try:
        if config.suite.tasks:
            zeroshot.check(config.suite.include_path, config.suite.tasks)
        cell = CellIdentity(
            model=config.model.name,
            revision=config.model.revision,
            source_precision=config.model.source_precision,
            dtype=config.model.dtype,
            parameters=config.model.parameters,
            pipeline="+".join(step_label(step) for step in config.pipeline),
            steps=[describe(s) | _facts(m) for s, m in zip(config.pipeline, methods, strict=True)],
            family="+".join(dict.fromkeys(m.family for m in methods)),
            engine=config.engine.label,
            device=config.device.name,
            suite=config.suite.name,
            speed=config.speed.name,
            calibration=calibration_text.fingerprint(placed) if any(m.needs.calibration for m in methods) else None,
            seed=config.seed,
            keys=identity.keys(placed),
            reference=identity.keys(_on_its_device(config.as_reference())),
        )
    except DataError as error:
        raise ConfigError(str(error)) from error
    return Cell(placed, cell, methods, overrides)


def _facts(method: Any) -> dict[str, str]:
    """What a record says of a method beside its name and settings: whose code it is, and what weights are rounded to."""
    return {"reference": method.reference} | ({"grid": method.weight_grid} if method.weight_grid else {})


def on_this_machine(config: RunConfig) -> RunConfig:
    """A configuration with devices and revisions resolved."""
    return _on_its_device(_resolve_revision(_resolve_device(config)))


def _resolve_device(config: RunConfig) -> RunConfig:
    """The configuration with `device.name` resolved: by what jobs ask for where stages run elsewhere, else by what this machine has."""
    machine, device, launcher = hardware(), config.device, config.launcher
    has_cards = bool(machine.gpus) if launcher.is_local else any((launcher.cards, *(size.cards for size in launcher.sizes)))
    name = device.name if device.name != "auto" else ("cuda" if has_cards or device.cards > 1 else "cpu")
    if launcher.is_local and name == "cuda" and machine.gpus and device.index + device.cards > len(machine.gpus):
        asked = f"device.index={device.index}" + (f" device.cards={device.cards}" if device.cards > 1 else "")
        raise ConfigError(f"{asked}: this machine has {len(machine.gpus)} CUDA cards, numbered from 0")
    if name == "cpu" and device.cards > 1:
        raise ConfigError(f"device.cards={device.cards}: with device=cpu there are no cards; give device=cuda")
    return config.model_copy(update={"device": device.model_copy(update={"name": name})})


def _on_its_device(config: RunConfig) -> RunConfig:
    """The configuration with `device.compress` resolved: the only device of its methods, else where it is measured."""
    device = config.device
    if device.compress != "auto":
        return config
    only = {needed: step.name for step in config.pipeline if (needed := build_method(step).needs.device)}
    if len(only) > 1:
        raise ConfigError(f"'{only['cpu']}' runs on a CPU only and '{only['cuda']}' on a CUDA card only; they cannot follow each other")
    return config.model_copy(update={"device": device.model_copy(update={"compress": next(iter(only), device.name)})})


def _resolve_revision(config: RunConfig) -> RunConfig:
    """The configuration with the commit of each model, teacher and draft of the hub in place of its branch or tag, where one tells it."""
    found: dict[str, Any] = {"pipeline": [step.model_copy(update={"draft": _at_commit(step.draft)}) for step in config.pipeline]}
    found |= {"model": _at_commit(config.model), "teacher": _at_commit(config.teacher)}
    return config.model_copy(update=found)


def _at_commit(part: Any) -> Any:
    """A model or teacher with its commit, where it is of the hub and one tells it; None as it is."""
    kind, _, repository = part.source.partition(":") if part else ("", "", "")
    commit = hub.commit_of(repository, part.revision) if kind == "hf" else None
    return part.model_copy(update={"revision": commit}) if commit else part
