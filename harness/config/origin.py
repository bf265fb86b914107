"""Every key of a configuration: its value, where the value comes from, what it means and what else it may be."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from slimbench.harness.config import compose
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.meaning import choices, meanings
from slimbench.harness.config.overrides import read
from slimbench.harness.config.schema import CalibrationConfig, RunConfig
from slimbench.harness.config.sources import CONF_DIR, choice_path, conf_dirs, groups, package, shipped
from slimbench.harness.config.targets import locate
from slimbench.util.text import nearest

_SHARED = "Goes to each method of the pipeline that has a setting of this name, in place of its own; null: to none."
_FEW = 12


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a configuration.

    Attributes:
        key: As it is written on the command line.
        value: What it is in this configuration.
        source: The override, `FILE:LINE`, or the class whose default it is.
        values: What else it may be, in words.
        meaning: What it says, with units.
    """

    key: str
    value: Any
    source: str
    values: str
    meaning: str


def keys(overrides: Sequence[str], wanted: str | None = None) -> list[Key]:
    """The keys of the configuration that the overrides name, or those at and below one of them.

    Args:
        overrides: As for `slimbench run`.
        wanted: `suite`, `suite.windows`, `method.gptq`, …; a method that is not chosen is.

    Raises:
        ConfigError: There is no such key, or the overrides are wrong.
    """
    if wanted and wanted.startswith("method.") and not any(text.startswith("method=") for text in overrides):
        overrides = [*overrides, f"method={wanted.split('.')[1]}"]
    config, chosen = compose.composed(overrides)
    found = list(_Listing(config, chosen, overrides).keys())
    if wanted is None:
        return found
    below = [key for key in found if f"{key.key}.".startswith(f"{wanted}.")]
    if not below:
        raise ConfigError(f"no key '{wanted}'{nearest(wanted, {part for key in found for part in _prefixes(key.key)})}")
    return below


class _Listing:
    def __init__(self, config: dict[str, Any], chosen: dict[str, list[str]], overrides: Sequence[str]) -> None:
        self._config, self._chosen = config, chosen
        self._given = {key: str(o.input_line) for o in read(overrides) for key in _flat(o.key_or_group, o.value())}
        self._lines: dict[str, str] = {}
        for group in groups():
            if group == "experiment":  # the last but for the overrides
                self._lines |= _lines(CONF_DIR / "config.yaml", "")
            for name in chosen.get(group, []):
                self._lines |= _lines(path := choice_path(group, name), package(path, group))

    def keys(self) -> Iterator[Key]:
        about = meanings(RunConfig)
        about |= {"method": about["pipeline"], "experiment": "Overrides that belong together, and what they sweep over."}
        for group in groups():
            names = self._chosen.get(group, [])
            source = self._given.get(group) or self._lines.get(f"defaults.{group}", "")
            yield Key(group, names[0] if len(names) == 1 else names or None, source, _offered(group), about[group])
        parts = RunConfig.parts()
        for name in [*groups(), *(key for key in self._config if key not in groups())]:
            value = self._config.get(name)
            if name == "method":
                yield from self._methods(value or {})
            elif name == "settings":
                yield from (self._key(f"settings.{key}", held, "", _SHARED) for key, held in (value or {}).items())
            elif name.startswith("calibration"):
                yield self._of(CalibrationConfig, name, name.partition("_")[2] or "source", value)
            elif name in parts and isinstance(value, dict):
                order = [field.alias or key for key, field in parts[name].model_fields.items()]
                yield from (self._of(parts[name], f"{name}.{key}", key, value[key]) for key in sorted(value, key=order.index))
            elif name == "reference":
                yield self._key(name, value, "a method", about[name])
            elif name in RunConfig.model_fields:
                yield self._of(RunConfig, name, name, value)

    def _methods(self, steps: dict[str, Any]) -> Iterator[Key]:
        shared = self._config.get("settings") or {}
        for step, settings in steps.items():
            if not isinstance(settings, dict) or "_target_" not in settings:
                continue
            cls = locate(settings["_target_"])
            for key, value in settings.items():
                if key == "_target_":
                    yield self._key(f"method.{step}.{key}", value, "", "The class of the method.")
                elif shared.get(key) is not None:
                    known = self._of(cls, f"settings.{key}", key, shared[key])
                    yield dataclasses.replace(known, key=f"method.{step}.{key}")
                else:
                    yield self._of(cls, f"method.{step}.{key}", key, value)

    def _of(self, cls: Any, key: str, name: str, value: Any) -> Key:
        """A key that a class declares."""
        name = next((n for n, f in getattr(cls, "model_fields", {}).items() if f.alias == name), name)
        declared = typing.get_type_hints(cls, include_extras=False).get(name)
        return self._key(key, value, choices(declared), meanings(cls).get(name, ""), cls)

    def _key(self, key: str, value: Any, values: str, meaning: str, cls: Any = None) -> Key:
        given = next((text for name, text in self._given.items() if name not in groups() and _touches(name, key)), None)
        source = given or self._lines.get(key) or (f"default of {cls.__name__}" if cls else "")
        return Key(key, value, source, values, re.sub(r"\bNone\b", "null", meaning))


def _prefixes(key: str) -> Iterator[str]:
    """`a.b.c` → a, a.b, a.b.c."""
    parts = key.split(".")
    return (".".join(parts[: length + 1]) for length in range(len(parts)))


def _flat(key: str, value: Any) -> Iterator[str]:
    """The keys that an override gives a value: its own, or those of its mapping."""
    if not isinstance(value, dict):
        yield key
    else:
        for name, held in value.items():
            yield from _flat(f"{key}.{name}", held)


def _touches(given: str, key: str) -> bool:
    """Whether an override of one key says something about another: it is the same, above or below it."""
    return f"{key}.".startswith(f"{given}.") or given.startswith(f"{key}.")


def _offered(group: str) -> str:
    names = shipped(group)
    return ", ".join(names) if len(names) <= _FEW else f"{len(names)} choices below conf/{group}/"


def _lines(path: Path, package_: str) -> dict[str, str]:
    """Key → `FILE:LINE` for every key that stands in a YAML, its defaults list as `defaults.GROUP`."""
    root = next(folder for folder in conf_dirs() if path.is_relative_to(folder))
    shown = Path("conf") / path.relative_to(root) if root == CONF_DIR else path
    start = "" if package_ in ("", "_global_") else f"{package_}."
    found: dict[str, str] = {}

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.value:
            name = prefix + str(key.value)
            found[name] = f"{shown}:{key.start_mark.line + 1}"
            if isinstance(value, yaml.MappingNode):
                walk(value, f"{name}.")
            elif key.value == "defaults" and isinstance(value, yaml.SequenceNode):
                for entry in value.value:
                    for group, _ in entry.value if isinstance(entry, yaml.MappingNode) else ():
                        found[f"defaults.{str(group.value).split('/')[-1]}"] = f"{shown}:{group.start_mark.line + 1}"

    tree = yaml.compose(path.read_text(encoding="utf-8"))
    if isinstance(tree, yaml.MappingNode):
        walk(tree, start)
    return found
