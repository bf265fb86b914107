"""The steps of a pipeline as a row shows them: by the names that their settings have today, and the grid that weights lie on.

What a name in `conf/method/` stands for may change; a record keeps its settings. So a step whose name now means other settings is shown
under the shipped name that comes nearest to what was run: `gptq` of a time when it took the range to the largest weight is `gptq-minmax`.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.parse import build_method
from slimbench.harness.config.registry import label as labelled
from slimbench.harness.config.schema import StepConfig
from slimbench.harness.config.sources import choice, conf_dirs, shipped, shipped_method, shipped_target
from slimbench.harness.config.targets import complete, locate
from slimbench.harness.schema.identity import CellIdentity
from slimbench.methods.base import Method


def label(cell: CellIdentity) -> str:
    """The pipeline in words, each step under a name that its settings have today; as it was recorded where no such name is known."""
    return "+".join(labels) if (labels := [label for label, _ in _told(cell)]) else cell.pipeline


def names(cell: CellIdentity) -> list[str]:
    """The names of the steps in `conf/method/` today."""
    recorded = [str(step.get("name", "unnamed")) for step in cell.steps]
    return [name for _, name in _told(cell)] or recorded


def grid(cell: CellIdentity) -> str | None:
    """What the last step that rounds weights rounded them to; None where none does, or none is known."""
    return next((found for step in reversed(cell.steps) if (found := step.get("grid") or _grid(*_settings(step)))), None)


def command(text: str, cell: CellIdentity) -> str:
    """The command that makes a cell again, with the names that its steps have today."""
    for step, name in zip(cell.steps, names(cell), strict=True):
        if (before := str(step.get("name"))) == name:
            continue
        whole = rf"(?<![\w-]){re.escape(before)}(?![\w-])"
        words = [
            re.sub(whole, name, word, count=1) if word.lstrip("'+").startswith(("method=", f"method.{before}.")) else word
            for word in text.split(" ")
        ]
        text = " ".join(words if words != text.split(" ") else [*words, f"method={name}"])
    return text


def _told(cell: CellIdentity) -> list[tuple[str, str]]:
    """Label and name of each step; nothing where the label of the cell is not that of its steps."""
    recorded = cell.pipeline.split("+")
    if len(recorded) != len(cell.steps):
        return []
    return [_named(text, *_settings(step)) for text, step in zip(recorded, cell.steps, strict=True)]


def _settings(step: dict[str, Any]) -> tuple[str, str | None, str]:
    """Name, method and settings of a step; what it does not say of its method is not guessed."""
    settings = step.get("settings")
    return str(step.get("name", "")), step.get("method"), json.dumps(settings if isinstance(settings, dict) else {}, sort_keys=True)


@lru_cache(maxsize=4096)
def _named(recorded: str, name: str, method: str | None, settings: str) -> tuple[str, str]:
    """The label and the name of a step today, from the label, name, method and settings that were recorded.

    Of the shipped choices of the method, the nearest is one beside which the label spells out just what differs, else the one with the
    fewest differences.
    """
    stated: dict[str, Any] = json.loads(settings)
    try:
        usual = shipped_method(name)
        cls = locate(usual["_target_"])
    except ConfigError:
        return recorded, name
    if cls.name != method or not stated.keys() <= usual.keys():
        return recorded, name
    held = complete({"_target_": usual["_target_"]}) | stated
    spelled = set(re.findall(r"[(,](\w+)=", recorded.removeprefix(name)))
    if _changed(held, usual).keys() == spelled:
        return recorded, name
    changed = {other: _changed(held, shipped_method(other)) for other in _names_of(tuple(conf_dirs()))[usual["_target_"]]}
    nearest = min(changed, key=lambda other: (changed[other].keys() != spelled, len(changed[other]), len(choice("method", other)), other))
    return labelled(nearest, changed[nearest]), nearest


@lru_cache(maxsize=8)
def _names_of(folders: tuple[Path, ...]) -> dict[str, list[str]]:
    """The shipped names of each class of methods, where `folders` hold them; every file is read once."""
    found: dict[str, list[str]] = {}
    for name in shipped("method"):
        found.setdefault(shipped_target(name), []).append(name)
    return found


def _changed(held: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """The settings that are not as usual."""
    return {key: value for key, value in held.items() if usual.get(key) != value}


@lru_cache(maxsize=4096)
def _grid(name: str, method: str | None, settings: str) -> str | None:
    """What a method says of its grid under recorded settings, where it is shipped and has them still."""
    try:
        built: Method = build_method(StepConfig(name=name, target=shipped_target(name), settings=json.loads(settings)))
    except ConfigError:
        return None
    return built.weight_grid if built.name == method else None
