"""Which data sets of the hub lm-eval's own tasks read, as their definitions say. lm-eval, which takes long for it, is not imported."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from slimbench.tasks import hub
from slimbench.tasks.errors import DataError

_STATED = re.compile(rb"^[\"']?(?:task|group)[\"']?: *[\"']?([^\s\"'\[{]+)[\"']? *$", re.MULTILINE)
_NOT_OF_A_CONFIGURATION = (
    "trust_remote_code",
    "streaming",
    "token",
    "revision",
    "num_proc",
    "keep_in_memory",
    "verification_mode",
    "cache_dir",
)
_BUILDERS = ("json", "csv", "parquet", "arrow", "text")  # of `datasets`, for files that are named by their address


@dataclass(frozen=True)
class DataSet:
    """What lm-eval gives to `load_dataset` for a task; `path` is None where the task's own code decides what it reads."""

    task: str
    path: str | None
    name: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def label(self) -> str:
        return ":".join(filter(None, [self.path, self.name])) if self.path else f"what task {self.task} reads by code of its own"

    def is_cached(self) -> bool:
        """Whether the library finds it where nothing may be asked."""
        settings = {name: value for name, value in self.settings.items() if name not in _NOT_OF_A_CONFIGURATION}
        return self.path is not None and hub.is_prepared(self.path, self.name, self.settings.get("revision"), settings)

    def size(self) -> int | None:
        """Bytes to download, where the hub tells."""
        return hub.size(self.path, self.name, settings=_settings(self.settings)) if self.path else None

    def fetch(self) -> None:
        """Prepare it in the library's cache.

        Raises:
            DataError: It cannot be had.
        """
        if self.path is None:
            raise DataError(f"{self.label} cannot be fetched before it runs")
        from datasets import load_dataset

        hub.patiently(f"data set {self.label}", lambda: load_dataset(self.path, self.name, **_settings(self.settings)))


def fetch(tasks: Sequence[str]) -> None:
    """Get what is not there yet of the data of lm-eval's own tasks, with patience: the library itself asks once.

    Raises:
        tasks.errors.HubError: The hub or the way to it failed, again and again.
        DataError: It cannot be had.
    """
    for data in of_tasks(tuple(tasks)):
        if data.path and not data.is_cached():
            data.fetch()


@cache
def of_tasks(tasks: tuple[str, ...]) -> list[DataSet]:
    """The data sets on the hub of lm-eval's own tasks, groups and tags, each once."""
    found: dict[tuple[str | None, str | None, str], DataSet] = {}
    for definition in _definitions(list(tasks)):
        name, path = str(definition.get("task")), definition.get("dataset_path")
        if path in _BUILDERS or (isinstance(path, str) and Path(path).exists()):
            continue
        own_code = not isinstance(path, str) or "class" in definition or "custom_dataset" in definition
        settings = definition.get("dataset_kwargs") or {}
        part = DataSet(name, None) if own_code else DataSet(name, str(path), definition.get("dataset_name"), settings)
        found.setdefault((part.path, part.name, name if own_code else repr(settings)), part)
    return list(found.values())


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name != "trust_remote_code"}


def _definitions(names: list[str], seen: frozenset[str] = frozenset()) -> Iterator[dict[str, Any]]:
    """The definition of each task that the names come to, with what it includes."""
    for name in names:
        for definition in _stated(name) if name not in seen else ():
            members = definition.get("task")
            if isinstance(members, list):
                yield from _members(members, seen | {name})
            else:
                yield definition


def _members(members: list[Any], seen: frozenset[str]) -> Iterator[dict[str, Any]]:
    """The definitions of a group's members: names, changed definitions, and groups within."""
    for member in members:
        if isinstance(member, str):
            yield from _definitions([member], seen)
        elif isinstance(member.get("task"), list):
            yield from _members(member["task"], seen)
        else:
            yield from ({**definition, **member} for definition in _definitions([str(member.get("task"))], seen))


def _stated(name: str) -> list[dict[str, Any]]:
    """What is defined under a name: a task or group by its file, else all that carry it as a tag."""
    if files := _index().get(name):
        return [_read(file) for file in files[:1]]
    homes = {file.parent for file in (*_files(), *_templates()) if _carries(file, name)}
    near = (file for file in _files() if homes & set(file.parents))
    return [definition for file in near if name in _list((definition := _read(file)).get("tag")) and "task" in definition]


def _carries(file: Path, tag: str) -> bool:
    text = file.read_bytes()
    return tag.encode() in text and b"tag" in text


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@cache
def _files(pattern: str = "*.yaml") -> list[Path]:
    spec = importlib.util.find_spec("lm_eval")
    return sorted((Path(spec.origin).parent / "tasks").rglob(pattern)) if spec and spec.origin else []


def _templates() -> list[Path]:
    """Files that are only included."""
    return _files("*_yaml")


@cache
def _index() -> dict[str, list[Path]]:
    """The files that define each task and group by name."""
    found: dict[str, list[Path]] = {}
    for file in _files():
        for name in _STATED.findall(file.read_bytes()):
            found.setdefault(name.decode(errors="replace"), []).append(file)
    return found


class _Loader(yaml.CSafeLoader if hasattr(yaml, "CSafeLoader") else yaml.SafeLoader):  # type: ignore[misc]
    """Reads lm-eval's YAML without running the functions that it names."""


_Loader.add_constructor("!function", lambda loader, node: f"!function {node.value}")


def _read(file: Path) -> dict[str, Any]:
    """A definition over those that it includes."""
    document = yaml.load(file.read_text(encoding="utf-8", errors="replace"), Loader=_Loader)
    if not isinstance(document, dict):
        return {}
    included: dict[str, Any] = {}
    for name in _list(document.pop("include", [])):
        base = file.parent / str(name)
        included |= _read(base) if base.is_file() else {}
    return included | document
