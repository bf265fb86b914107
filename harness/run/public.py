"""A configuration without the folders of this machine: of a local file its name stays.

`file:/home/alice/models/tiny` stands in a record as `file:tiny`. The content of the file is part of the record's key, so nothing is lost
by which it could be told from another; whoever has the file runs the recorded command again from the folder that holds it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_FILE = re.compile(r"file:[^,\[\]{}'\"]*/")
_TASKS = re.compile(r"^(\+*suite\.include_path=)(.*)$")
_PATH = re.compile(r"(?<![^\[,'\"])(?!asset:)[^\[\],'\"]*/")


def config(value: Any) -> Any:
    """A configuration (plain containers) with names in place of paths."""
    if isinstance(value, dict):
        return {key: _folder(part) if key == "include_path" else config(part) for key, part in value.items()}
    if isinstance(value, list):
        return [config(part) for part in value]
    return f"file:{Path(value.removeprefix('file:')).name}" if isinstance(value, str) and value.startswith("file:") else value


def overrides(given: Iterable[str]) -> list[str]:
    """Overrides of the command line with names in place of paths; where results go is no part of a cell."""
    kept = (word for word in given if not word.lstrip("+").startswith("results="))
    return [_TASKS.sub(lambda found: found[1] + _PATH.sub("", found[2]), _FILE.sub("file:", word)) for word in kept]


def folders(value: Any) -> Iterator[str]:
    """The folders in which the local files of a configuration lie: what no message of it may name."""
    if isinstance(value, dict):
        include = value.get("include_path")
        for place in include if isinstance(include, list) else [include]:
            if isinstance(place, str) and not place.startswith("asset:"):
                yield str(Path(place).expanduser().parent)
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from folders(part)
    if isinstance(value, str) and value.startswith("file:"):
        yield str(Path(value.removeprefix("file:")).expanduser().parent)


def _folder(include_path: Any) -> Any:
    if isinstance(include_path, list):
        return [_folder(place) for place in include_path]
    return Path(include_path).name if isinstance(include_path, str) and not include_path.startswith("asset:") else include_path
