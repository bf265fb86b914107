"""Verified copies of artefacts on the disk of this node, to load from: `$SLIMBENCH_SCRATCH`.

A copy is made once, whichever process asks first, and held against its hashes while it is made and before each use. The least recently used
copies make room for new ones; where there is none, the shared folder is read instead.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from slimbench.util import checksums, locks
from slimbench.util.files import atomic_folder, remove, set_modes, size_of, sweep
from slimbench.util.hashing import hash_file

VARIABLE = "SLIMBENCH_SCRATCH"
_IN_USE_S = 86400.0
_SPARE = 0.05
"""Share of the disk that stays free."""


def folder() -> Path | None:
    """Where the copies of this node lie; None where none are asked for."""
    named = os.environ.get(VARIABLE)
    return Path(named).expanduser().absolute() / "slimbench" if named else None


def copy_of(source: Path, hashes: Mapping[str, str], manifest: str) -> Path:
    """The copy of a folder on this node, made if need be; the folder itself where none is asked for or there is no room.

    Args:
        source: Its files must be those of the hashes.
        hashes: SHA-256 of each file by its path in it.
        manifest: A further file of it, whose content names the copy.
    """
    if (root := folder()) is None:
        return source
    content = (source / manifest).read_bytes()
    copy = root / hashlib.sha256(content).hexdigest()
    try:
        with locks.held(copy):
            sweep(root)
            if (copy / manifest).is_file() and not checksums.fault(copy, hashes):
                os.utime(copy)
                return copy
            if not _make_room(root, size_of(source)):
                return source
            with atomic_folder(copy) as unfinished:
                for name, sha256 in hashes.items():
                    (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source / name, unfinished / name)
                    if hash_file(unfinished / name) != sha256:
                        raise OSError(f"{name} was not copied as it is")
                (unfinished / manifest).write_bytes(content)
    except OSError:  # a disk that is full or broken costs speed only
        return source
    set_modes(copy, 0o444)
    for name, sha256 in hashes.items():
        checksums.remember(copy / name, sha256)
    return copy


def _make_room(root: Path, needed: int) -> bool:
    """Whether there is room for some bytes, after copies that were not used for a day have gone, the oldest first."""
    copies = sorted((path for path in root.glob("[0-9a-f]*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
    while True:
        disk = shutil.disk_usage(root)
        if disk.free - needed >= _SPARE * disk.total:
            return True
        if not copies or time.time() - copies[0].stat().st_mtime < _IN_USE_S:
            return False
        with suppress(OSError):
            remove(copies.pop(0))
