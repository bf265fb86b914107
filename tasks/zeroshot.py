"""Where a suite's zero-shot tasks are defined, and what identifies them. lm-eval itself is not imported here."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from slimbench.tasks import bigbench, reasoning
from slimbench.tasks.errors import DataError
from slimbench.util.hashing import hash_file
from slimbench.util.text import closest, nearest

ASSET_PREFIX = "asset:"
_SHIPPED: dict[str, Any] = {f"asset:{bigbench.ASSET}": bigbench, reasoning.PLACE: reasoning}
_SHIPPED_NAMES = ("bb_", "gym_")
_HEADLINE = ("acc_norm", "acc", "exact_match")


def folders(include_path: Sequence[str], tasks: Sequence[str]) -> list[Path]:
    """The folders of task YAMLs that lm-eval must read for some tasks, beside its own.

    Args:
        include_path: Folders of one's own. The shipped tasks, `asset:bigbench` and generated ones, are always beside them.
        tasks: Names of tasks and groups.

    Raises:
        DataError: There is no such folder or task, or two of the folders define one.
    """
    homes = _homes(include_path, tasks).values()
    return [_SHIPPED[p].task_folder() if p in _SHIPPED else _folder(p) for p in _places(include_path) if p in homes]


def of_lm_eval(include_path: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """The tasks that neither one's own folders nor slimbench define: those of lm-eval, whose data lies on the hub."""
    return [task for task, home in _homes(include_path, tasks).items() if home is None]


def check(include_path: Sequence[str], tasks: Sequence[str]) -> None:
    """Raise `DataError` if a task is defined neither below `include_path` nor by slimbench or lm-eval, or twice."""
    _homes(include_path, tasks)


def fingerprint(include_path: Sequence[str], tasks: Sequence[str]) -> str:
    """16 hex digits that identify the definitions of tasks and their local data; needs no fetch.

    lm-eval's own tasks are identified by name: their versions stand in the record.

    Raises:
        DataError: An unknown folder, asset or task.
    """
    homes = _homes(include_path, tasks)
    files = {home: _definitions(_folder(home)) for home in homes.values() if home is not None and home not in _SHIPPED}
    identity = [
        task if home is None else _SHIPPED[home].fingerprint(task) if home in _SHIPPED else _identity(task, files[home])
        for task, home in sorted(homes.items())
    ]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _places(include_path: Sequence[str]) -> list[str]:
    """Where tasks are looked for: one's own folders, then the shipped ones."""
    return list(dict.fromkeys([*include_path, *_SHIPPED]))


def _homes(include_path: Sequence[str], tasks: Sequence[str]) -> dict[str, str | None]:
    """Where each task is defined; None: by lm-eval, which is only asked where a name could be a mistaken one of a folder."""
    known = {place: _known(place) for place in _places(include_path)}
    homes: dict[str, str | None] = {}
    for task in tasks:
        found = [place for place, names in known.items() if task in names]
        if len(found) > 1:
            raise DataError(f"task '{task}' is defined twice: in {found[0]} and in {found[1]}")
        mistaken = task.startswith(_SHIPPED_NAMES) or (set(include_path) - _SHIPPED.keys() and not _in_lm_eval(task))
        if not found and mistaken:
            raise DataError(f"no task '{task}' in {', '.join(known)}{nearest(task, {n for names in known.values() for n in names})}")
        homes[task] = found[0] if found else None
    return homes


def _in_lm_eval(task: str) -> bool:
    """Whether lm-eval defines a task, by its files: the library takes seconds to import."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.origin:
        return False
    files = list((Path(spec.origin).parent / "tasks").rglob("*.yaml"))
    if any(file.stem.lstrip("_") == task for file in files):
        return True
    stated = re.compile(rf"^(task|group|tag): *[\"']?{re.escape(task)}[\"']? *$", re.MULTILINE)
    return any(stated.search(file.read_text(encoding="utf-8", errors="replace")) for file in files)


def drawn(task: str, items: int, limit: int, seed: int) -> list[int]:
    """Which of so many items of a task a seeded sample takes, in ascending order. A larger limit adds items to those of a smaller one."""
    order = list(range(items))
    random.Random(f"{seed}:{task}").shuffle(order)
    return sorted(order[:limit])


def groups() -> dict[str, str]:
    """What each shipped task asks for: `knowledge`, `language`, `reasoning`, `social`, or `answers` that are written out."""
    return {name: task.group for name, task in bigbench.definitions().items()} | dict.fromkeys(reasoning.definitions(), "answers")


def headline_metrics() -> dict[str, str]:
    """The metric by which each shipped task is ranked."""
    return {name: task.metric for name, task in bigbench.definitions().items()} | dict.fromkeys(reasoning.definitions(), "exact_match")


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
        raise DataError(f"there is no task folder {folder}{closest(folder.name, siblings)}")
    return folder


def _known(place: str) -> list[str]:
    if place.startswith(ASSET_PREFIX):
        _check_asset(place)
    if place in _SHIPPED:
        return list(_SHIPPED[place].definitions())
    return list(_definitions(_folder(place)))


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
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
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
