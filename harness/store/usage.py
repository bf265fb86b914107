"""What the cache holds, when it was used last, and what of it may go."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from slimbench.harness.schema.record import Record
from slimbench.harness.store import artefact, leftovers, scratch
from slimbench.util import files, locks
from slimbench.util.files import cache_dir
from slimbench.util.text import slug

KINDS = {
    "downloads": ("assets", "tasks", "documents"),
    "models": ("models",),
    "artefacts": ("artefacts",),
    "checkpoints": ("checkpoints", "partial"),
    "reference distributions": ("reference",),
    "readings of prompts": ("readings",),
    "texts of models": ("taught", "written"),
    "tokens": ("tokens",),
    "kernels": ("kernels",),
    "environments": ("environments",),
    "hashes": ("hashes",),
}
IN_USE_S = 86400.0
"""What was used more lately may be in use now: a stage that has loaded it tells nobody of its end."""


@dataclass(frozen=True)
class Item:
    """What is kept or removed as one.

    Attributes:
        used: When it was used last as far as the file system knows; seconds since 1970.
        bytes: Of its files, without those that another item holds, too.
    """

    kind: str
    path: Path
    bytes: int
    files: int
    used: float


@dataclass
class Pruned:
    """What was removed, or would be; `leftovers` are bytes of what ended processes left behind."""

    items: list[Item] = field(default_factory=list)
    leftovers: int = 0

    @property
    def bytes(self) -> int:
        return self.leftovers + sum(item.bytes for item in self.items)


def items() -> list[Item]:
    """Everything in the cache and in the scratch of this node that is whole; of each kind the least recently used first."""
    seen: set[tuple[int, int]] = set()
    found = [_item(kind, path, seen) for kind, rooms in KINDS.items() for room in rooms for path in _entries(cache_dir() / room)]
    if copies := scratch.folder():
        found += [_item("scratch", path, seen) for path in _entries(copies)]
    order = [*KINDS, "scratch"]
    return sorted((item for item in found if item), key=lambda item: (order.index(item.kind), item.used))


def prune(older_than_s: float | None, most_bytes: float | None, keep: Iterable[Record] = (), dry: bool = False) -> Pruned:
    """Remove what was not used for some time, then the least recently used until the rest is small enough, and all leftovers.

    What is locked, staged, or was used within a day stays, and so does what the records name.

    Args:
        keep: Records whose artefacts, models and environments stay.
        dry: Remove nothing.
    """
    left = [path for path in leftovers.of_cache() if path.suffix not in (locks.OWNER, locks.TAKEN)]
    result = Pruned(leftovers=sum(map(files.size_of, left)))
    present, names = items(), _names(keep)
    now, total = time.time(), sum(item.bytes for item in present)
    for item in sorted(present, key=lambda item: item.used):
        idle = now - item.used
        is_old = older_than_s is not None and idle > older_than_s
        is_much = most_bytes is not None and total > most_bytes
        if (is_old or is_much) and idle > IN_USE_S and not _is_named(item, names) and not _is_busy(item):
            result.items.append(item)
            total -= item.bytes
    if not dry:
        for path in left:
            files.remove(path)
        for item in result.items:
            _remove(item)
    return result


def _entries(folder: Path) -> Iterator[Path]:
    """What lies in a folder of the cache, without locks and what is temporary."""
    for path in sorted(folder.glob("[!.]*")):
        if path.suffix not in (locks.OWNER, locks.TAKEN, ".lock"):
            yield path


def _item(kind: str, path: Path, seen: set[tuple[int, int]]) -> Item | None:
    place = artefact.object_of(path.name) if kind == "artefacts" else path
    size = count = 0
    used = 0.0
    with suppress(OSError):
        used = place.stat().st_mtime
        for entry in files.entries(place):
            status = entry.lstat()
            if entry.is_dir():
                continue
            count += 1
            if kind != "artefacts":  # an object is used when its folder says so: to look for damage is no use
                used = max(used, status.st_atime, status.st_mtime)
            if (name := (status.st_dev, status.st_ino)) not in seen:
                seen.add(name)
                size += status.st_size
    return Item(kind, path, size, count, used) if count else None


@dataclass(frozen=True)
class _Names:
    keys: Collection[str]
    models: Collection[str]
    environments: Collection[str]


def _names(records: Iterable[Record]) -> _Names:
    keys, models, environments = set(), set(), set()
    for record in records:
        keys |= {record.cell.keys.compress, record.cell.reference.compress}
        models.add(slug(record.cell.model))
        environment = record.provenance.get("environment")
        if isinstance(environment, dict):
            environments.add(str(environment.get("name")))
    return _Names(keys, models, environments)


def _is_named(item: Item, names: _Names) -> bool:
    name = item.path.name
    match item.kind:
        case "artefacts":
            return name in names.keys
        case "checkpoints":
            return name.rpartition("-")[0] in names.keys
        case "models":
            return any(name.startswith(f"{model}-") for model in names.models)
        case "environments":
            return name.rpartition("-")[0] in names.environments
    return False


def _is_busy(item: Item) -> bool:
    """Whether a process that may live holds its lock or is making it."""
    if item.path.name in locks.owners(item.path.parent):
        return True
    return item.kind in ("artefacts", "checkpoints") and artefact.is_staged(item.path.name.rpartition("-")[0] or item.path.name)


def _remove(item: Item) -> None:
    if item.kind == "artefacts":
        with suppress(OSError):
            if os.stat(artefact.object_of(item.path.name)).st_mtime <= item.used:  # else it was opened meanwhile
                artefact.discard(item.path.name)
    else:
        files.remove(item.path)
