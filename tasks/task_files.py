"""Folders of tasks in lm-eval's own format: a YAML and a JSON-lines file for each, written to the cache once, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from slimbench.util import checksums, locks
from slimbench.util.files import cache_dir

Items = Callable[[], Mapping[str, Iterable[Mapping[str, Any]]]]


def folder(name: str, tasks: Mapping[str, Mapping[str, Any]], items: Items) -> Path:
    """The folder of some tasks in the cache, made where it is not there as it was written.

    Args:
        name: Of the folder; it identifies all that is in it.
        tasks: The definition of each, but for its name and where its data lies.
        items: Gives the items of each, where they have to be written.
    """
    place = cache_dir() / "tasks" / name
    with locks.held(place):
        if not _is_whole(tasks, place):
            _write(tasks, items(), place)
    return place


def _write(tasks: Mapping[str, Mapping[str, Any]], items: Mapping[str, Iterable[Mapping[str, Any]]], place: Path) -> None:
    with checksums.sealed_folder(place) as temporary:
        for name, task in tasks.items():
            lines = [json.dumps(item, ensure_ascii=False) for item in items[name]]
            (temporary / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            (temporary / f"{name}.yaml").write_text(_text(name, task, place), encoding="utf-8")


def _text(name: str, task: Mapping[str, Any], place: Path) -> str:
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(place / f"{name}.jsonl")}}, "test_split": "test"}
    return yaml.safe_dump({"task": name, **data, **task}, sort_keys=False)


def _is_whole(tasks: Mapping[str, Mapping[str, Any]], place: Path) -> bool:
    """Whether all files are there as they were written, and name each other; they do not once the cache has been moved."""
    files = [(place / f"{name}.yaml", _text(name, task, place)) for name, task in tasks.items()]
    return checksums.seal_fault(place) is None and all(
        file.is_file() and file.read_text(encoding="utf-8") == text and file.with_suffix(".jsonl").is_file() for file, text in files
    )
