"""The engines that the configuration offers: what they load, and whether they can run here."""

from __future__ import annotations

import importlib.util

from slimbench.harness.config import environments
from slimbench.harness.config.schema import EngineConfig
from slimbench.harness.config.sources import choice, shipped


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
    absent = [name for name in engine.modules if importlib.util.find_spec(name) is None]
    extra = f"'slimbench[{engine.extra}]'" if engine.extra else " ".join(absent)
    return f"needs {', '.join(absent)}: pip install {extra}" if absent else None
