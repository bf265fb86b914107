"""Files and folders that appear whole or not at all, and where the cache lies."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from platformdirs import user_cache_dir


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all, and survives a crash once it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that takes its place when the block ends well, and vanishes when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
        for entry in (*temporary.rglob("*"), temporary):
            entry.chmod(0o755 if entry.is_dir() else 0o644)
        replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(folder: Path, target: Path) -> None:
    """Move a finished folder to its place, durably. What stood there goes; of two that come at the same time one stays, whole."""
    for entry in (*folder.rglob("*"), folder):
        _sync(entry)
    while True:
        try:
            os.replace(folder, target)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex}")
        with suppress(FileNotFoundError):
            os.replace(target, old)
        shutil.rmtree(old, ignore_errors=True)
    _sync(target.parent)


def _sync(entry: Path) -> None:
    descriptor = os.open(entry, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_dir() -> Path:
    """The cache folder: `$SLIMBENCH_CACHE`, or the user's cache folder. It need not exist."""
    return Path(os.environ.get("SLIMBENCH_CACHE") or user_cache_dir("slimbench")).expanduser().absolute()
