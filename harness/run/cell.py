"""A resolved configuration becomes a cell: its words for the board and the content keys of its three stages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimbench.harness.config import local_model
from slimbench.harness.config.parse import build_method
from slimbench.harness.config.schema import ConfigError, RunConfig, StepConfig
from slimbench.harness.config.sources import shipped_method
from slimbench.harness.measure.hardware import available_cores, hardware
from slimbench.harness.run import public
from slimbench.harness.schema.identity import CellIdentity, Keys, Stage
from slimbench.tasks import assets, calibration, corpora, zeroshot
from slimbench.tasks.errors import DataError
from slimbench.util.hashing import digest
from slimbench.util.text import nearest


@dataclass(frozen=True)
class Cell:
    """One row of the board, before it is measured.

    Attributes:
        config: The validated configuration, with `device.name` and `device.threads` resolved.
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

    def stages(self) -> list[Stage]:
        """The stages that are asked for and make sense: random weights have no quality."""
        wanted = [Stage.COMPRESS, *(stage for stage in (Stage.QUALITY, Stage.SPEED) if stage in self.config.stages)]
        return [stage for stage in wanted if not (self.config.model.is_random and stage is Stage.QUALITY)]

    def reference(self) -> Cell:
        """The dense cell with which this one is compared."""
        kept = [o for o in self.overrides if not o.lstrip("+~").startswith(("method=", "method.", "settings."))]
        return make_cell(self.config.as_reference(), (*kept, f"method={self.config.reference.name}"))


def make_cell(config: RunConfig, overrides: tuple[str, ...] = ()) -> Cell:
    """Resolve device and threads, build the methods and compute the content keys.

    Raises:
        ConfigError: The configuration names something that does not exist.
    """
    config = _resolve_device(config)
    methods = tuple(build_method(step) for step in config.pipeline)
    try:
        keys, reference = _keys(config), _keys(config.as_reference())
        if config.suite.tasks:
            zeroshot.check(config.suite.include_path, config.suite.tasks)
        calibrated = any(m.needs.calibration for m in methods)
        identity = CellIdentity(
            model=config.model.name,
            source_precision=config.model.source_precision,
            dtype=config.model.dtype,
            parameters=config.model.parameters,
            pipeline="+".join(step_label(step) for step in config.pipeline),
            steps=[s.model_dump() | {"reference": m.reference} for s, m in zip(config.pipeline, methods, strict=True)],
            family="+".join(dict.fromkeys(m.family for m in methods)),
            engine=config.engine.name,
            device=config.device.name,
            suite=config.suite.name,
            speed=config.speed.name,
            calibration=_calibration_fingerprint(config) if calibrated else None,
            seed=config.seed,
            keys=keys,
            reference=reference,
        )
    except DataError as error:
        raise ConfigError(str(error)) from error
    return Cell(config, identity, methods, overrides)


def step_label(step: StepConfig) -> str:
    """The name of a step, followed by the settings that differ from its YAML: `gptq(bits=3)`."""
    try:
        usual = shipped_method(step.name)
    except ConfigError:
        usual = {}
    changed = [f"{k}={v}" for k, v in step.settings.items() if usual and usual.get(k) != v]
    return f"{step.name}({','.join(changed)})" if changed else step.name


def _resolve_device(config: RunConfig) -> RunConfig:
    machine, device = hardware(), config.device
    name = device.name if device.name != "auto" else ("cuda" if machine.gpus else "cpu")
    if name == "cuda" and machine.gpus and device.index >= len(machine.gpus):
        raise ConfigError(f"device.index={device.index}: this machine has {len(machine.gpus)} CUDA cards, numbered from 0")
    resolved = device.model_copy(update={"name": name, "threads": device.threads or available_cores()})
    return config.model_copy(update={"device": resolved})


def _keys(config: RunConfig) -> Keys:
    methods = [build_method(step) for step in config.pipeline]
    compress = digest(
        {
            "model": _model_identity(config),
            "pipeline": [{"target": s.target, "settings": _settings(m)} for s, m in zip(config.pipeline, methods, strict=True)],
            "calibration": _calibration_fingerprint(config) if any(m.needs.calibration for m in methods) else None,
            "seed": config.seed,
        }
    )
    suite, device, machine = config.suite, config.device, hardware()
    quality = digest(
        {
            "compress": compress,
            "engine": config.engine.name,
            "device": device.name,
            "protocol": suite.protocol() | {"include_path": None, "corpus": None},
            "corpora": [corpora.fingerprint(spec) for spec in suite.corpus],
            "tasks": zeroshot.fingerprint(suite.include_path, suite.tasks) if suite.tasks else None,
        }
    )
    known = device.name == "cpu" or device.index < len(machine.gpus)
    speed = digest(
        {
            "compress": compress,
            "engine": config.engine.name,
            "hardware": machine.fingerprint(device.name, device.index, device.threads or 0) if known else device.name,
            "protocol": config.speed.protocol(),
        }
    )
    return Keys(compress=compress, quality=quality, speed=speed)


def _settings(method: Any) -> dict[str, Any]:
    """The settings that define the work; those that are off are left out, so that a new one does not change the keys of old cells."""
    import dataclasses

    return {name: value for name, value in dataclasses.asdict(method).items() if value is not None}


def _calibration_fingerprint(config: RunConfig) -> str:
    c = config.calibration
    return calibration.fingerprint(c.source, c.samples, c.length, c.seed)


def _model_identity(config: RunConfig) -> dict[str, Any]:
    model = config.model
    identity: dict[str, Any] = {"source": model.source, "revision": model.revision, "dtype": model.dtype, "shape": model.shape}
    kind, _, rest = model.source.partition(":")
    if kind == "asset":
        if rest not in assets.catalogue():
            raise ConfigError(f"model.source: no asset '{rest}'{nearest(rest, assets.catalogue())}")
        identity["content"] = assets.catalogue()[rest].fingerprint
    elif kind == "file":
        identity |= {"source": "file", "content": local_model.identity(Path(rest).expanduser())}
    elif kind not in ("hf", "random"):
        raise ConfigError(f"model.source '{model.source}' is none of asset:NAME, hf:ORG/NAME, file:FOLDER, random")
    elif kind == "random" and not model.shape:
        raise ConfigError("model.source=random needs model.shape, the fields of its config.json")
    return identity
