"""Files held against their SHA-256 before use, without reading gigabytes each time.

A hash is remembered in the cache folder under the file's path, with the size and the times (modified, inode changed) at
which it was taken; it is taken again where one of these moved. A file changed less than two seconds ago is not remembered:
on a coarse file system a second change would leave the same time behind.

A *sealed* folder holds `hashes.json`: the hashes of its other files, and facts about them. It appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from slimbench.util.files import atomic_folder, cache_dir, write_atomically
from slimbench.util.hashing import hash_file

SEAL = "hashes.json"
_SETTLED_S = 2.0
_SILENT_S = 2.0
_CHUNK = 1 << 24

_Signature = tuple[int, int, int]
_known: dict[Path, tuple[_Signature, str]] = {}


def sha256(file: Path) -> str:
    """SHA-256 of a file's content in hex, from memory where the file has not changed since."""
    return sha256s([file])[0]


def sha256s(files: Iterable[Path]) -> list[str]:
    """The hashes of files in their order; says on standard error how far it is when it takes more than two seconds.

    Raises:
        OSError: A file cannot be read.
    """
    paths = [file.absolute() for file in files]
    hashes = {path: _remembered(path) for path in paths}
    unknown = [path for path, known in hashes.items() if known is None]
    progress = _Progress(unknown)
    for path in unknown:
        hashes[path] = _take(path, progress)
    progress.close()
    return [str(hashes[path]) for path in paths]


def remember(file: Path, sha256: str) -> None:
    """Keep the hash of a file as it lies there now, if the caller has just taken it from these bytes."""
    _remember(file.absolute(), _signature(file), sha256)


def fault(folder: Path, expected: Mapping[str, str]) -> str | None:
    """What is wrong with the files of a folder, in one line, or None.

    Args:
        expected: SHA-256 in hex by path relative to the folder; other files are not looked at.
    """
    absent = [name for name in expected if not (folder / name).is_file()]
    if absent:
        return f"{absent[0]} is missing"
    try:
        seen = sha256s(folder / name for name in expected)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    for name, sha256 in zip(expected, seen, strict=True):
        if sha256 != expected[name]:
            return f"{name} has other bytes than were written (SHA-256 {sha256[:8]}, not {expected[name][:8]})"
    return None


@contextmanager
def sealed_folder(target: Path, facts: dict[str, Any] | None = None) -> Iterator[Path]:
    """A new folder that takes the place of `target` with its seal when the block ends well, and vanishes when it does not.

    Args:
        facts: Kept in the seal; JSON.
    """
    with atomic_folder(target) as folder:
        yield folder
        write_seal(folder, facts)


def write_seal(folder: Path, facts: dict[str, Any] | None = None) -> None:
    """Write `hashes.json` for the files that lie in the folder now."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SEAL)
    hashes = {path.relative_to(folder).as_posix(): hash_file(path) for path in files}
    write_atomically(folder / SEAL, json.dumps({"files": hashes, "facts": facts or {}}, indent=1).encode())


def sealed_hashes(folder: Path) -> dict[str, str] | None:
    """The hashes in the seal of a folder; None where there is no seal that can be read."""
    files = _seal(folder).get("files")
    return files if isinstance(files, dict) else None


def seal_fault(folder: Path) -> str | None:
    """What is wrong with a sealed folder, in one line, or None."""
    hashes = sealed_hashes(folder)
    return "it has no hashes" if hashes is None else fault(folder, hashes)


def facts(folder: Path) -> dict[str, Any]:
    """The facts in the seal of a folder."""
    return dict(_seal(folder).get("facts", {}))


def _seal(folder: Path) -> dict[str, Any]:
    try:
        seal = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return seal if isinstance(seal, dict) else {}


def _signature(file: Path) -> _Signature:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _note(path: Path) -> Path:
    return cache_dir() / "hashes" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"


def _remembered(path: Path) -> str | None:
    signature = _signature(path)
    if path in _known and _known[path][0] == signature:
        return _known[path][1]
    try:
        note = json.loads(_note(path).read_text(encoding="utf-8"))
        if note["path"] == str(path) and tuple(note["signature"]) == signature:
            _known[path] = signature, str(note["sha256"])
            return _known[path][1]
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return None


def _take(path: Path, progress: _Progress) -> str:
    """Hash a file; what changed while it was read is not remembered."""
    before, seen = _signature(path), hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK):
            seen.update(chunk)
            progress.add(len(chunk))
    if _signature(path) == before:
        _remember(path, before, seen.hexdigest())
    return seen.hexdigest()


def _remember(path: Path, signature: _Signature, sha256: str) -> None:
    if time.time() - signature[1] / 1e9 < _SETTLED_S:
        return
    _known[path] = signature, sha256
    with suppress(OSError):  # a cache that cannot be written costs time, nothing else
        write_atomically(_note(path), json.dumps({"path": str(path), "signature": signature, "sha256": sha256}).encode(), durable=False)


class _Progress:
    """How far hashing is, once a second on standard error, from the third second on."""

    def __init__(self, files: list[Path]) -> None:
        self.files, self.done, self.shown = files, 0, False
        self._next = time.monotonic() + _SILENT_S

    def add(self, count: int) -> None:
        self.done += count
        if time.monotonic() > self._next:
            total = sum(file.stat().st_size for file in self.files)
            print(f"\rhashing {self.files[0].parent}: {self.done / 1e9:.1f} of {total / 1e9:.1f} GB", end="", file=sys.stderr, flush=True)
            self._next, self.shown = time.monotonic() + 1.0, True

    def close(self) -> None:
        if self.shown:
            print(file=sys.stderr)
