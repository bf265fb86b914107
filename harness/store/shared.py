"""What many records hold alike, stored once in a results folder: `RESULTS/shared/<kind>-<hash>.json`.

A list of packages is the same for every stage that ran in one environment, ids and prompt hashes of items, and the
prompts that are continued, for every cell of one suite.
In a record's file `{"$shared": "packages-<hash>"}` stands for the content of such a file, to which other keys of the same object are
added. The name holds the first 32 hex digits of the SHA-256 of the file, so folders merge by copying and no part can change unnoticed.
Nothing above the store knows of this: it writes and reads whole records.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from slimbench.harness.store.decode import decode
from slimbench.util.files import may_pass, read_patiently

FOLDER = "shared"
REFERENCE = "$shared"
_NAME = re.compile(r"[a-z]+-([0-9a-f]{32})")


def folder_of(record: Path) -> Path:
    """Where the shared parts of a record's file lie."""
    return record.parent.parent.parent / FOLDER


def split(data: dict[str, Any]) -> dict[str, bytes]:
    """Put references in place of what a record shares with others, and return the files that they name: name → content.

    Args:
        data: A record as JSON; changed in place.
    """
    parts: dict[str, bytes] = {}
    for kind, holder, key, columns in _places(data):
        value = holder[key]
        if REFERENCE in value:
            continue
        taken = {name: value[name] for name in columns or value if value.get(name)}
        if taken:
            content = json.dumps(taken, ensure_ascii=False, indent=0).encode() + b"\n"
            name = f"{kind}-{_hash(content)}"
            parts[name] = content
            holder[key] = {REFERENCE: name} | {name: item for name, item in value.items() if name not in taken}
    return parts


def join(data: Any, folder: Path | None) -> Any:
    """A record with its shared parts in place of their references.

    Args:
        data: JSON of a record's file; changed in place.
        folder: Where the parts lie; None where a record has to be whole.

    Raises:
        ValueError: A part is not there, or is not what its name says. The message is one line.
        OSError: It cannot be read at present.
    """
    for _, holder, key, _ in _places(data):
        if REFERENCE in holder[key]:
            own = dict(holder[key])
            holder[key] = _part(own.pop(REFERENCE), folder) | own
    return data


def is_current(path: Path, content: bytes) -> bool:
    """Whether a file is there and holds just this."""
    try:
        return path.stat().st_size == len(content) and path.read_bytes() == content
    except OSError:
        return False


def _places(data: Any) -> Iterator[tuple[str, dict[str, Any], str, tuple[str, ...]]]:
    """Where a record may have a shared part: kind, the object that holds it and its key, and the columns that are shared; none for all."""
    if not isinstance(data, dict):
        return
    provenance, quality = data.get("provenance"), data.get("quality")
    if isinstance(provenance, dict) and isinstance(provenance.get("packages"), dict):
        yield "packages", provenance, "packages", ()
    for task in (quality.get("zeroshot") or []) if isinstance(quality, dict) else []:
        if isinstance(task, dict) and isinstance(task.get("items"), dict):
            yield "items", task, "items", ("ids", "hashes")
    written = quality.get("generation") if isinstance(quality, dict) else None
    if isinstance(written, dict) and isinstance(written.get("asked"), dict):
        yield "prompts", written, "asked", ()


def _part(name: Any, folder: Path | None) -> dict[str, Any]:
    """A copy of the content of a shared part: what is done to one record is not done to others."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a shared part")
    if folder is None:
        raise ValueError(f"its part {name} is not in it")
    path = folder / f"{name}.json"
    try:
        status = path.stat()
        return dict(_checked(path, name, status.st_mtime_ns, status.st_size))
    except OSError as error:
        if may_pass(error):
            raise
        raise ValueError(f"its shared part {FOLDER}/{name}.json cannot be read: {error.strerror or error}") from error


@lru_cache(maxsize=256)
def _checked(path: Path, name: str, changed: int, size: int) -> dict[str, Any]:
    """The content of a part, if that is what its name says. Read again when its file has changed."""
    content = read_patiently(path)
    if not name.endswith(f"-{_hash(content)}"):
        raise ValueError(f"its shared part {FOLDER}/{name}.json is not what its name says")
    value = decode(content)
    if not isinstance(value, dict):
        raise ValueError(f"its shared part {FOLDER}/{name}.json is no object")
    return value


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
