"""What a dotted path of the configuration names: a class, its settings and their defaults."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

from slimbench.harness.config.errors import ConfigError


def locate(dotted: str) -> Any:
    """The object that a dotted path of the config names.

    Raises:
        ConfigError: Module or attribute do not exist.
    """
    module, _, attribute = dotted.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"cannot find '{dotted}': {error}") from error


def complete(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a method, `_target_` among them, with the defaults of its class where they are silent.

    Raises:
        ConfigError: There is no such class.
    """
    return _defaults(locate(str(settings["_target_"]))) | settings


@functools.cache
def _defaults(cls: Any) -> dict[str, Any]:
    """The defaults of a class as YAML would hold them, its own before those of its bases; a field without one is left out."""
    fields = {f.name: f for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    order = [name for base in cls.__mro__ for name in vars(base).get("__annotations__", {}) if name in fields]
    stated = {n: f.default if (f := fields[n]).default_factory is dataclasses.MISSING else f.default_factory() for n in order}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in stated.items() if value is not dataclasses.MISSING}
