"""Where a suite's zero-shot tasks are defined, and what identifies them. lm-eval itself is not imported here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from slimbench.tasks import bigbench
from slimbench.tasks.errors import DataError
from slimbench.util.hashing import hash_file
from slimbench.util.text import nearest

ASSET_PREFIX = "asset:"
_HEADLINE = ("acc_norm", "acc", "exact_match")


def resolve(include_path: str | None) -> Path | None:
    """The folder of task YAMLs for lm-eval's `include_path`, made if it is an asset; None for lm-eval's own tasks.

    Raises:
        DataError: There is no such folder or asset.
    """
    if include_path is None:
        return None
    if include_path.startswith(ASSET_PREFIX):
        _check_asset(include_path)
        return bigbench.task_folder()
    return _folder(include_path)


def check(include_path: str | None, tasks: list[str]) -> None:
    """Raise `DataError` if a task is not defined below `include_path`. lm-eval's own tasks (None) are left to lm-eval."""
    if include_path is None:
        return
    known = _known(include_path)
    for task in tasks:
        if task not in known:
            raise DataError(f"no task '{task}' in {include_path}{nearest(task, known)}")


def fingerprint(include_path: str | None, tasks: list[str]) -> str:
    """16 hex digits that identify the definitions of tasks and their local data; needs no fetch.

    lm-eval's own tasks are identified by name: their versions stand in the record.

    Raises:
        DataError: An unknown folder, asset or task.
    """
    check(include_path, tasks)
    if include_path is None:
        identity: list[Any] = sorted(tasks)
    elif include_path.startswith(ASSET_PREFIX):
        identity = [bigbench.fingerprint(task) for task in sorted(tasks)]
    else:
        files = _definitions(_folder(include_path))
        identity = [_identity(task, files) for task in sorted(tasks)]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def groups() -> dict[str, str]:
    """What each shipped task asks for: `knowledge`, `language`, `reasoning` or `social`."""
    return {name: task.group for name, task in bigbench.definitions().items()}


def headline_metrics() -> dict[str, str]:
    """The metric by which each shipped task is ranked."""
    return {name: task.metric for name, task in bigbench.definitions().items()}


def headline(task: str) -> tuple[str, ...]:
    """The metrics by which a task may be ranked; the first that was measured counts."""
    declared = headline_metrics().get(task)
    return (declared,) if declared else _HEADLINE


def _check_asset(include_path: str) -> None:
    name = include_path.removeprefix(ASSET_PREFIX)
    if name != bigbench.ASSET:
        raise DataError(f"asset '{name}' holds no zero-shot tasks{nearest(name, [bigbench.ASSET])}")


def _folder(include_path: str) -> Path:
    folder = Path(include_path).expanduser().absolute()
    if not folder.is_dir():
        siblings = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()] if folder.parent.is_dir() else []
        raise DataError(f"there is no task folder {folder}{nearest(folder.name, siblings)}")
    return folder


def _known(include_path: str) -> list[str]:
    if include_path.startswith(ASSET_PREFIX):
        _check_asset(include_path)
        return list(bigbench.definitions())
    return list(_definitions(_folder(include_path)))


class _Loader(yaml.SafeLoader):
    """Reads lm-eval's YAML without running the functions that it names: `!function utils.f` becomes the file `utils.py`."""


_Loader.add_constructor("!function", lambda loader, node: str(node.value).rpartition(".")[0].replace(".", "/") + ".py")


def _definitions(folder: Path) -> dict[str, Path]:
    """The YAML that defines each task or group below a folder."""
    found = {}
    for file in sorted(folder.rglob("*.yaml")):
        document = _read(file)
        for key in ("task", "group"):
            if isinstance(document, dict) and isinstance(document.get(key), str):
                found[document[key]] = file
    return found


def _read(file: Path) -> Any:
    try:
        return yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise DataError(f"{file} is no valid YAML: {' '.join(str(error).split())}") from error


def _identity(name: str, files: dict[str, Path], seen: frozenset[str] = frozenset()) -> list[Any]:
    """A definition as written, its members if it is a group, and the hash of each local file that it names in place of its path."""
    file = files[name]
    text, members = file.read_text(encoding="utf-8"), []
    for word in sorted(set(_words(_read(file)))):
        named = next((path for path in (file.parent / word, Path(word)) if path.is_file()), None)
        if named is not None:
            text = text.replace(word, hash_file(named)) if word in text else text + hash_file(named)
        elif word in files and word not in seen | {name}:
            members.append(_identity(word, files, seen | {name}))
    return [text, members]


def _words(node: Any) -> Iterator[str]:
    if isinstance(node, str) and len(node) < 1000 and "\n" not in node and "\0" not in node:
        yield node
    elif isinstance(node, dict | list):
        for part in node.values() if isinstance(node, dict) else node:
            yield from _words(part)
