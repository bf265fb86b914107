"""The engines that the configuration offers: what they load, and whether they can run here."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from slimbench.harness.config import environments
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.schema import EngineConfig
from slimbench.harness.config.sources import choice, shipped
from slimbench.methods.base import Method, Unsupported
from slimbench.methods.formats.policy import FORMAT, Acts
from slimbench.util.text import nearest

if TYPE_CHECKING:
    from slimbench.methods.formats.policy import Policy


def catalogue() -> list[EngineConfig]:
    """The engines of `conf/engine/`, the reference engine first."""
    found = [get(name) for name in shipped("engine")]
    return sorted(found, key=lambda engine: (engine.name != "transformers", engine.name))


def get(name: str) -> EngineConfig:
    """An engine by the name of its YAML.

    Raises:
        ConfigError: There is none of that name.
    """
    return EngineConfig.model_validate(choice("engine", name))


def missing(engine: EngineConfig) -> str | None:
    """The command that would make an engine run here, None where nothing is missing."""
    if engine.environment:
        return None if environments.get(engine.environment).is_made else f"needs its environment: slimbench env make {engine.environment}"
    modules = [*engine.modules, *(["flash_attn"] if engine.attention == "flash_attention_2" else [])]
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    extra = f"'slimbench[{engine.extra}]'" if engine.extra else " ".join(absent)
    return f"needs {', '.join(absent)}: pip install {extra}" if absent else None


def able(format_: str) -> EngineConfig:
    """The first engine that loads a format and can run here, in this environment.

    Raises:
        methods.base.Unsupported: There is none.
    """
    loading = [engine for engine in catalogue() if format_ in engine.loaders]
    for engine in loading:
        if not engine.environment and missing(engine) is None:
            return engine
    raise Unsupported("; ".join(f"{e.name} {missing(e)}" for e in loading) or f"no engine loads format {format_}")


def policy_of(method: Method) -> Policy | None:
    """What a method asks an engine to do while a model runs, as far as its settings say it; None where it asks nothing."""
    return method.policy() if isinstance(method, Acts) else None


def follows(engine: EngineConfig, policy: Policy | None) -> bool:
    """Whether an engine that does not load policies runs one by itself: a draft of a kind that it has."""
    return FORMAT not in engine.loaders and policy is not None and policy.slot == "draft" and policy.kind in engine.drafts


def runs(engine: EngineConfig, policy: Policy) -> bool:
    """Whether an engine runs a policy, of an artefact that it loads or by itself."""
    return (FORMAT in engine.loaders and policy.slot not in engine.without) or follows(engine, policy)


def beyond(limits: dict[str, tuple[int, int | None]], policy: Policy) -> str | None:
    """The setting of a policy that an engine cannot follow, and the nearest that it can; None where it follows all of them.

    Args:
        limits: The least and the most of each setting.

    Raises:
        ConfigError: It has no such setting.
    """
    for name, (least, most) in limits.items():
        if (value := getattr(policy, name, None)) is None:
            settings = [f.name for f in fields(policy)]  # type: ignore[arg-type]
            raise ConfigError(f"engine.drafts: {policy.kind} has no setting '{name}'{nearest(name, settings)}")
        taken = max(value, least) if most is None else min(max(value, least), most)
        if taken != value:
            allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
            return f"takes {name} {allowed}, not {value}: the nearest is {name}={taken}"
    return None


@cache
def version(target: str) -> int:
    """The version that an engine class states, read from its source: a plan has its keys without the libraries of the engine.

    Raises:
        ConfigError: There is no such class, or it states none.
    """
    module, _, name = target.rpartition(".")
    try:
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.origin:
            raise ImportError(f"no module '{module}'")
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    except (ImportError, OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"cannot find '{target}': {error}") from error
    body = next((node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if body is None:
        raise ConfigError(f"cannot find '{target}': no such class in {module}")
    stated = {ast.unparse(node.target): node.value for node in body if isinstance(node, ast.AnnAssign)}
    value = stated.get("version")
    if not isinstance(value, ast.Constant) or not isinstance(value.value, int):
        raise ConfigError(f"engine class {target} states no version; give it `version: ClassVar[int] = 1`")
    return value.value
