"""What the record of a stranger may make this machine do.

A record says by name what was run. The classes, loaders and environments behind the names are those of this installation, whatever else
the record says; and what would bring the record's own code, files or hosts into a run is refused unless the user trusts the record.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from slimbench.harness.config.parse import with_drafts
from slimbench.harness.config.schema import EngineConfig, RunConfig
from slimbench.harness.config.sources import choice, shipped_target
from slimbench.tasks import corpora
from slimbench.tasks.calibration import SELF

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?")
_REVISION = re.compile(r"\w[\w-]*([./]\w[\w-]*)*")
_WORD = re.compile(r"[A-Za-z0-9][\w.+@-]*|\d+:\d+")
_HOOKS = ("auto_map", "attn_implementation", "experts_implementation", "quantization_config")
"""Fields of a `config.json` that make transformers import code: of the checkpoint, or kernels of the hub."""


_MEASURED = ("model", "suite", "speed", "device", "calibration", "seed", "stages")
"""Sections that say what is measured; the others say where and by whom, which is the auditor's choice."""


class Distrusted(Exception):
    """A record asks for what only a trusted record gets. The message is one line."""


def configuration(config: dict[str, Any], trusted: bool) -> RunConfig:
    """What a record says was run, as this installation runs it: nothing but shipped methods is imported, nothing read or fetched.

    Args:
        config: The `config` of a record.
        trusted: Allow code of the checkpoint, local files and folders of tasks. Classes and loaders are shipped ones even then.

    Raises:
        Distrusted: It needs trust and has none.
        ConfigError: It names a method or engine that this installation does not have.
        ValueError: It is no configuration.
    """
    if not trusted and (reason := next(_distrusted(config), None)):
        raise Distrusted(reason)
    own = {
        "pipeline": [_shipped(step) for step in _list(config.get("pipeline"))],
        "reference": _shipped(config.get("reference")),
        "engine": _engine(_section(config, "engine")),
        "limits": {},
    }
    return with_drafts(RunConfig.model_validate({name: config[name] for name in _MEASURED if name in config} | own))


def require_own_code(configs: Iterable[RunConfig], trusted: bool) -> None:
    """Hold the configurations of a plan against this installation, whose classes and loaders alone are run. Each name is looked up once.

    Args:
        trusted: Allow what the user has asked for by name: code of the checkpoint, and folders of tasks.

    Raises:
        Distrusted: It names other code than the methods and the engine of its names, or needs trust and has none.
        ConfigError: It names a method or engine that this installation does not have.
    """
    targets: dict[str, str] = {}
    engines: dict[str, EngineConfig] = {}
    for config in configs:
        for step in (*config.pipeline, config.reference):
            own = targets.get(step.name) or targets.setdefault(step.name, shipped_target(step.name))
            if step.target != own:
                raise Distrusted(f"method '{step.name}' is {own} here, not {step.target}")
        name, asked = config.engine.name, config.engine.model_copy(update={"attention": "default"})
        if asked != (engines.get(name) or engines.setdefault(name, EngineConfig.model_validate(_engine({"name": name})))):
            raise Distrusted(f"engine '{name}' is not what conf/engine/{name}.yaml says")
        if not trusted and (reason := next(_bringing_code(config.model_dump(include={"model", "suite"})), None)):
            raise Distrusted(reason)


def _shipped(step: Any) -> dict[str, Any]:
    """A step with the class that this installation has for a method of its name."""
    name = str(_section({"step": step}, "step").get("name"))
    return {"name": name, "target": shipped_target(name), "settings": _section(step, "settings")}


def _engine(told: dict[str, Any]) -> dict[str, Any]:
    """The engine that this installation has under a name, with the attention that a record tells."""
    return choice("engine", str(told.get("name"))) | {"attention": told.get("attention", "default")}


def _distrusted(config: dict[str, Any]) -> Iterator[str]:
    """Why a configuration needs trust, one line for each reason."""
    model, suite, text, speed = (_section(config, name) for name in ("model", "suite", "calibration", "speed"))
    named = [(speed, "prompts"), (suite, "retrieval")]
    others = [_section(part, name).get("corpus") for part, name in named if part.get(name) is not None]
    source = str(model.get("source"))
    yield from _bringing_code(config)
    kind, _, rest = source.partition(":")
    if kind not in ("asset", "random") and not (kind == "hf" and _HUB_NAME.fullmatch(rest)):
        yield f"model.source={source}: neither a packaged asset nor a model of the hub"
    if (revision := model.get("revision")) is not None and not _REVISION.fullmatch(str(revision)):
        yield f"model.revision={revision}: no commit, tag or branch"
    for spec in (*_list(suite.get("corpus")), *others, *([] if text.get("source") == SELF else [text.get("source")])):
        if not _is_public(spec):
            yield f"text '{spec}': neither a packaged corpus nor a data set of the hub"
    words = [*_list(suite.get("tasks")), *(_section(step, "settings") for step in _list(config.get("pipeline")))]
    if strange := next((text for text in _texts([words, model.get("shape")]) if not _WORD.fullmatch(text)), None):
        yield f"'{strange}': no plain word, it could be a path or an address"


def _bringing_code(config: dict[str, Any]) -> Iterator[str]:
    """What of a configuration could bring code along with models and tasks, one line for each."""
    model, suite = _section(config, "model"), _section(config, "suite")
    if model.get("trust_remote_code"):
        yield "model.trust_remote_code: it would run code that the checkpoint brings along"
    for place in _list(suite.get("include_path")):
        if place is not None and not str(place).startswith("asset:"):
            yield f"suite.include_path={place}: its tasks could bring code along"
    if hook := next((key for key in _keys(model.get("shape")) if key.startswith("_") or key in _HOOKS), None):
        yield f"model.shape.{hook}: it could bring code along"


def _is_public(spec: Any) -> bool:
    """Whether a text is named by the catalogue, or as a data set of the hub that no file of this machine is mistaken for."""
    match = corpora.HUB_SPEC.fullmatch(str(spec))
    if match is None:
        return str(spec) in corpora.catalogue()
    inside = (match["config"] or "").split("/")
    named = bool(_HUB_NAME.fullmatch(match["path"])) and not Path(match["path"]).exists()
    return named and ".." not in inside and (len(inside) == 1 or inside[0] != "")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(part)


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from map(str, value)
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _keys(part)


def _section(config: Any, name: str) -> dict[str, Any]:
    section = config.get(name) if isinstance(config, dict) else None
    return section if isinstance(section, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
