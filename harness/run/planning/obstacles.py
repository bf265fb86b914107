"""Why a stage of a cell cannot run, known before anything is started: what no machine could do, and what this one lacks."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from slimbench.harness.config import engines, environments
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.sections.teaching import recipe
from slimbench.harness.measure.hardware import hardware
from slimbench.harness.run.cell import Cell
from slimbench.harness.run.planning import memory
from slimbench.harness.schema.identity import Stage
from slimbench.harness.stages import drafts, models
from slimbench.methods.base import Unsupported, format_of
from slimbench.methods.formats.policy import FORMAT, Acts, Policy
from slimbench.tasks.calibration import SELF

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def require_extras(cell: Cell) -> None:
    """Raise `ConfigError` with the install command if a method's library is missing."""
    for step, method in zip(cell.config.pipeline, cell.methods, strict=True):
        if missing := method.needs.missing_modules():
            extra = f"'slimbench[{method.needs.extra}]'" if method.needs.extra else " ".join(missing)
            raise ConfigError(f"method '{step.name}' needs {', '.join(missing)}: pip install {extra}")
        if method.needs.text:
            require_modules(f"method '{step.name}' with recipe '{method.recipe}'", recipe(method.recipe).modules)


def require_modules(who: str, modules: Iterable[str]) -> None:
    """Raise `ConfigError` with the install command if a library of teaching is missing."""
    if missing := sorted(name for name in modules if find_spec(name) is None):
        raise ConfigError(f"{who} needs {', '.join(missing)}: pip install 'slimbench[teaching]'")


def require_sense(cell: Cell) -> None:
    """Raise `ConfigError` if quality alone is asked of random weights."""
    name, wanted = cell.config.model.name, cell.config.stages
    if cell.config.model.is_random and wanted == ["quality"]:
        raise ConfigError(f"stages=[quality]: {name} has random weights, for speed and memory only; give stages=[speed]")


def obstacle(cell: Cell, stage: Stage) -> str | None:
    """Why a stage of the cell cannot run on this machine, in one line; None where nothing is in its way."""
    return impossible(cell, stage) or _lacking(cell, stage) or _uninstalled(cell, stage)


def impossible(cell: Cell, stage: Stage) -> str | None:
    """Why a stage of the cell cannot run on any machine, in one line; None where a machine may be there that can."""
    if stage is Stage.COMPRESS:
        return _misplaced(cell, stage) or _no_compression(cell)
    return _misplaced(cell, stage) or _no_engine(cell) or _no_text(cell, stage) or _no_draws(cell, stage)


def lost_card(cell: Cell, stage: Stage) -> str | None:
    """Why a stage that a cluster was to give a card has none, in one line: a fault of the job or its node, not of the cell."""
    device = cell.config.device.compress if stage is Stage.COMPRESS else cell.config.device.name
    if cell.config.launcher.is_local or device != "cuda" or hardware().gpus or impossible(cell, stage):
        return None
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "a CUDA card was asked for, and the job has none that torch can use" + (
        "" if named is None else f"; CUDA_VISIBLE_DEVICES is '{named}'"
    )


def environment(cell: Cell, stage: Stage) -> str | None:
    """Name of the environment that a stage runs in, None for this program's own."""
    if stage is not Stage.COMPRESS:
        return cell.config.engine.environment
    return next((method.needs.environment for method in cell.methods if method.needs.environment), None)


def _misplaced(cell: Cell, stage: Stage) -> str | None:
    """A method that does not run where it is told to."""
    config = cell.config
    only = [(s.name, m.needs.device) for s, m in zip(config.pipeline, cell.methods, strict=True) if m.needs.device]
    other = [(name, device) for name, device in only if device != config.device.compress] if stage is Stage.COMPRESS else []
    return f"{other[0][0]} runs on {other[0][1]} only, and device.compress is {config.device.compress}" if other else None


def _lacking(cell: Cell, stage: Stage) -> str | None:
    """What this machine lacks for a stage: a card or memory."""
    machine, config = hardware(), cell.config
    device = config.device.compress if stage is Stage.COMPRESS else config.device.name
    if device == "cuda" and not machine.gpus:
        needing = next((s.name for s, m in zip(config.pipeline, cell.methods, strict=True) if m.needs.device == "cuda"), None)
        asked = config.device.name == "cuda" or not needing
        lacking = "device=cuda, but this machine has no CUDA card that torch can use"
        return lacking if asked else f"{needing} needs a CUDA card; this machine has none"
    return memory.shortage(config, cell.methods, stage)


def _uninstalled(cell: Cell, stage: Stage) -> str | None:
    """An engine's modules or a stage's environment that are not on this machine."""
    if stage is not Stage.COMPRESS:
        reason = engines.missing(cell.config.engine)
        return f"engine {cell.config.engine.name} {reason}" if reason else None
    name = environment(cell, stage)
    made = name is None or environments.get(name).is_made
    return None if made else f"{cell.identity.pipeline} needs its environment: slimbench env make {name}"


def _no_compression(cell: Cell) -> str | None:
    shape = models.known_shape(cell.config.model)
    for method in cell.methods if shape else ():
        try:
            method.check(shape)
        except Unsupported as error:
            return str(error)
    if refusal := drafts.misfit(cell.config):
        return refusal
    reads = cell.config.calibration.source != SELF
    readers = [s.name for s, m in zip(cell.config.pipeline, cell.methods, strict=True) if (m.needs.calibration and reads) or m.needs.text]
    return f"{readers[0]} needs text, {cell.config.model.name} has no tokenizer" if readers and not _has_tokenizer(cell) else None


def _no_engine(cell: Cell) -> str | None:
    engine, device, format_ = cell.config.engine, cell.config.device.name, format_of(cell.methods)
    if format_ == FORMAT:
        if refusal := _left_out(cell) if format_ in engine.loaders else _no_policy(cell):
            return refusal
    elif format_ not in engine.loaders:
        return f"engine {engine.name} does not load format {format_}; it loads {', '.join(engine.loaders)}"
    if device not in engine.devices:
        return f"engine {engine.name} runs on {' and '.join(engine.devices)}, not on {device}"
    if engine.attention == "flash_attention_2" and device != "cuda":
        return f"engine.attention=flash_attention_2 runs on cuda, not on {device}; flash is torch's own"
    steps = zip(cell.config.pipeline, cell.methods, strict=True)
    own = next((step.name for step, method in steps if isinstance(method, Acts) and method.policy().attends), None)
    if engine.attention != "default" and own:
        return f"engine.attention={engine.attention}: {own} attends in its own way; leave the setting out"
    if cell.config.device.cards > 1 and format_ not in engine.spreads:
        able = [e.name for e in engines.catalogue() if format_ in e.spreads]
        return f"engine {engine.name} spreads no {format_} over several cards" + (f"; {', '.join(able)} would" if able else "")
    return None


def _left_out(cell: Cell) -> str | None:
    """Why an engine that loads policies does not run one of a pipeline; None where it runs all."""
    for step, method in zip(cell.config.pipeline, cell.methods, strict=True):
        if (policy := engines.policy_of(method)) and not engines.runs(cell.config.engine, policy):
            return f"engine {cell.config.engine.name} does not run {step.name}; {_able(policy)} would"
    return None


def _able(policy: Policy | None) -> str:
    """The engines that run a policy; of one that is not known, those that load policies."""
    able = [e.name for e in engines.catalogue() if (FORMAT in e.loaders if policy is None else engines.runs(e, policy))]
    return ", ".join(able)


def _no_policy(cell: Cell) -> str | None:
    """Why an engine that loads no policies does not run that of a pipeline by itself; None where it does."""
    engine, steps = cell.config.engine, zip(cell.config.pipeline, cell.methods, strict=True)
    acting = [(step.name, policy) for step, method in steps if (policy := engines.policy_of(method))]
    name, policy = acting[-1] if acting else (cell.config.pipeline[-1].name, None)
    if policy is None or not engines.follows(engine, policy):
        own = f" (of policies only drafts by {' and '.join(engine.drafts)})" if engine.drafts else ""
        return f"engine {engine.name} does not run {name}{own}; {_able(policy)} would"
    if (base := format_of(cell.methods[:-1])) not in engine.loaders:
        return f"engine {engine.name} does not load format {base}, which {name} follows; it loads {', '.join(engine.loaders)}"
    misfit = engines.beyond(engine.drafts[policy.kind], policy)
    return f"{name}: engine {engine.name} {misfit}" if misfit else None


def _no_text(cell: Cell, stage: Stage) -> str | None:
    return f"quality needs text, {cell.config.model.name} has no tokenizer" if stage is Stage.QUALITY and not _has_tokenizer(cell) else None


def _no_draws(cell: Cell, stage: Stage) -> str | None:
    engine, temperature = cell.config.engine, cell.config.speed.temperature
    if stage is not Stage.SPEED or temperature is None or engine.draws:
        return None
    able = ", ".join(each.name for each in engines.catalogue() if each.draws)
    return f"speed.temperature={temperature:g}: engine {engine.name} writes the likeliest token alone; {able} would draw"


def _has_tokenizer(cell: Cell) -> bool:
    """Whether the model brings a tokenizer; one that is not on this machine yet is believed to."""
    kind, _, rest = cell.config.model.source.partition(":")
    return kind != "random" and (kind != "file" or any((Path(rest).expanduser() / name).is_file() for name in _TOKENIZERS))
