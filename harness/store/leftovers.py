"""What ended processes left behind: temporary files, staging folders, locks without an owner, checkpoints of what is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from slimbench.harness.store import artefact, scratch
from slimbench.util import files, locks
from slimbench.util.files import cache_dir

LOCKS = ".locks"
_ROOMS = (".*", "*/.*", "*/*/.*", f"{LOCKS}/.*")
_HIDDEN = ("*/.*", "*/*.lock", "documents/*.[0-9]*", "tokens/*.[0-9]*.npy")
"""What is temporary in the cache, whoever made it."""


def of_results(root: Path) -> list[Path]:
    """Those of a results folder."""
    temporary = [path for room in _ROOMS for path in files.leftovers(root, room)]
    former = files.leftovers(root / LOCKS, "*.lock", every=True)  # older versions never removed a lock
    return sorted({*temporary, *former, *locks.abandoned(root / LOCKS)})


def of_cache() -> list[Path]:
    """Those of the cache, and of the copies on this node."""
    cache, copies = cache_dir(), scratch.folder()
    found = [path for room in (".*", "audit-*") for path in files.leftovers(cache, room)]
    found += [path for room in _HIDDEN for path in files.leftovers(cache, room, every=True)]
    found += files.leftovers(copies) if copies else []
    return [*found, *(path for folder in _lock_folders() for path in locks.abandoned(folder)), *_checkpoints(), *_unnamed()]


def sweep(root: Path) -> None:
    """Remove those of a results folder and of the cache; what cannot be removed stays."""
    with suppress(OSError):
        for path in (*of_results(root), *of_cache()):
            if path.suffix not in (locks.OWNER, locks.TAKEN):
                files.remove(path)
        for folder in (root / LOCKS, *_lock_folders()):
            locks.sweep(folder)


def _lock_folders() -> list[Path]:
    copies = scratch.folder()
    return [path for path in (*cache_dir().glob("[!.]*"), *([copies] if copies else [])) if path.is_dir()]


def _checkpoints() -> Iterator[Path]:
    """Checkpoints of pipelines whose artefact is there, and that nobody is making again."""
    for path in sorted((cache_dir() / "checkpoints").glob("*-[0-9]*")):
        key = path.name.rpartition("-")[0]
        if artefact.exists(key) and not artefact.is_staged(key):
            yield path


def _unnamed() -> list[Path]:
    """Objects that no key has stood for, for a day: who has opened one still reads it. And keys that stand for none."""
    keys = (path for path in sorted((cache_dir() / "artefacts").glob("[!.]*")) if path.is_symlink() and not path.exists())
    return [*(path for path in artefact.unnamed() if files.rests(path)), *keys]
