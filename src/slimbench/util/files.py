"""Files and folders that appear whole or not at all, and where the cache lies."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from platformdirs import user_cache_dir

from slimbench.util import processes

_LONGEST_NAME = 150
_FORMER_SCRATCH = "slimbench-" + 8 * "[a-z0-9_]"
"""As versions named it that told no process."""


_PASSING = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT}
"""Errors of a server that may be gone the next moment."""
_PAUSES_S = (0.1, 0.5, 2.0)
_DAY_S = 86400.0


def read_patiently(path: Path) -> bytes:
    """The content of a file; what may pass, such as a stale handle or a name that NFS has not seen yet, is waited out for seconds.

    Raises:
        OSError: It cannot be read.
    """
    for pause in _PAUSES_S:
        try:
            return path.read_bytes()
        except OSError as error:
            if not may_pass(error) and not (error.errno == errno.ENOENT and _is_listed(path)):
                raise
        time.sleep(pause)
    return path.read_bytes()


def may_pass(error: OSError) -> bool:
    """Whether an error says nothing of the file itself."""
    return error.errno in _PASSING


def _is_listed(path: Path) -> bool:
    try:
        return path.name in os.listdir(path.parent)
    except OSError:
        return False


def write_atomically(path: Path, content: bytes, durable: bool = True) -> None:
    """Write a file so that it appears whole or not at all, and survives a crash once it is there.

    Args:
        durable: False for what is made again in a moment: it is whole all the same, but a crash may lose it.
    """
    with atomic_file(path, durable) as temporary:
        temporary.write_bytes(content)


@contextmanager
def atomic_file(target: Path, durable: bool = True) -> Iterator[Path]:
    """A name beside `target` for a file that takes its place when the block ends well, and vanishes when it does not."""
    temporary = beside(target, ".tmp")
    try:
        try:
            temporary.touch()
        except FileNotFoundError:
            target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if durable:
            _sync(temporary)
        os.replace(temporary, target)
        if durable:
            _sync(target.parent)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that takes its place when the block ends well, and vanishes when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(target)
    temporary.mkdir()
    try:
        yield temporary
        set_modes(temporary)
        replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def set_modes(folder: Path, files: int = 0o666) -> None:
    """Give everything in a folder the rights of the folder itself, which are those that the user's umask leaves; a shared group stays.

    Args:
        files: Rights that a file may have at most.
    """
    rights = stat.S_IMODE(folder.stat().st_mode)
    for entry in folder.rglob("*"):
        status = entry.lstat()
        if stat.S_ISDIR(status.st_mode):
            entry.chmod(rights)
        elif stat.S_ISREG(status.st_mode):
            has_other_names = status.st_nlink > 1  # under which others may read it
            with suppress(PermissionError):  # it is another user's
                entry.chmod((stat.S_IMODE(status.st_mode) if has_other_names else rights) & files)


def replace_folder(folder: Path, target: Path) -> None:
    """Move a finished folder to its place, durably. What stood there goes; of two that come at the same time one stays, whole.

    From another file system it is copied first, so that it appears whole there, too.
    """
    sync_folder(folder)
    while True:
        try:
            os.replace(folder, target)
            break
        except OSError as error:
            if error.errno == errno.EXDEV:
                with atomic_folder(target) as copy:
                    shutil.copytree(folder, copy, dirs_exist_ok=True)
                shutil.rmtree(folder)
                return
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        old = beside(target, ".old")
        with suppress(FileNotFoundError):
            os.replace(target, old)
        shutil.rmtree(old, ignore_errors=True)
    _sync(target.parent)


def point(link: Path, target: str) -> None:
    """Let a symbolic link name a target, in one step and durably, whatever it named before."""
    new = beside(link, ".tmp")
    new.symlink_to(target)
    try:
        os.replace(new, link)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    _sync(link.parent)


def sync_folder(folder: Path) -> None:
    """Bring a folder and all that is in it to the disk."""
    for entry in (*folder.rglob("*"), folder):
        _sync(entry)


def scratch(purpose: str) -> tempfile.TemporaryDirectory[str]:
    """A folder for temporary files of this process, removed at the end of its block; what killed processes left of theirs goes, too."""
    _sweep_scratch()
    return tempfile.TemporaryDirectory(prefix=f"slimbench-{purpose}-{processes.current().stamp()}-", ignore_cleanup_errors=True)


@lru_cache(maxsize=1)
def _sweep_scratch() -> None:
    folder = Path(tempfile.gettempdir())
    for path in (*leftovers(folder, "slimbench-*"), *leftovers(folder, _FORMER_SCRATCH, every=True)):
        remove(path)


def sweep(folder: Path, pattern: str = ".*") -> int:
    """Remove the temporary files and folders of processes that are gone, and return their bytes."""
    found = [(path, size_of(path)) for path in leftovers(folder, pattern)]
    for path, _ in found:
        remove(path)
    return sum(size for _, size in found)


def leftovers(folder: Path, pattern: str = ".*", every: bool = False) -> list[Path]:
    """What processes left in a folder that are gone for certain, or of which nothing is known and nothing was written for a day.

    Args:
        every: Whatever the pattern fits is temporary, as older versions named no process.
    """
    found = []
    for path in sorted(folder.glob(pattern)):
        process = processes.of_name(path.name)
        is_temporary = every or process is not None or path.suffix == ".tmp" or ".old-" in path.name
        with suppress(OSError):
            if is_temporary and (process.is_gone() if process and process.is_known() else rests(path)):
                found.append(path)
    return found


def remove(path: Path) -> None:
    """Remove a file or a folder, read-only ones too; what cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(entry.lstat().st_size for entry in entries(path) if not entry.is_dir())


def entries(path: Path) -> Iterator[Path]:
    """A path and all that lies below it."""
    yield path
    if path.is_dir() and not path.is_symlink():
        yield from path.rglob("*")


def rests(path: Path) -> bool:
    """Whether nothing was written below a path for a day."""
    return time.time() - max(entry.lstat().st_mtime for entry in entries(path)) > _DAY_S


def beside(target: Path, ending: str = "") -> Path:
    """A new hidden name beside a path that tells whose it is: what a killed process leaves there is swept."""
    return target.with_name(f".{target.name[:_LONGEST_NAME]}.{processes.current().stamp()}{ending}")


def _sync(entry: Path) -> None:
    descriptor = os.open(entry, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (error.errno == errno.EINVAL and entry.is_dir()):  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def cache_dir() -> Path:
    """The cache folder: `$SLIMBENCH_CACHE`, or the user's cache folder. It need not exist."""
    return Path(os.environ.get("SLIMBENCH_CACHE") or user_cache_dir("slimbench")).expanduser().absolute()
