"""The id of a results folder, by which its own records are told from those that were copied into it.

It is the name of a file, `RESULTS/.slimbench/<id>.json`, made with the first record. Each record carries the id of the folder that it was
written in; in a folder of another id it is foreign until it is adopted. Where one folder was copied onto another the ids of both are there:
then no record is its own until somebody says so.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from slimbench.util import processes

FOLDER = ".slimbench"
_ID = re.compile(r"[0-9a-f]{16}")


def ids(root: Path) -> list[str]:
    """The ids of a folder: one, none before its first record, several after it was copied onto another."""
    folder = root / FOLDER
    try:
        status = folder.stat()
    except OSError:
        return []
    return list(_listed(folder, status.st_ino, status.st_mtime_ns))


@functools.lru_cache(maxsize=64)
def _listed(folder: Path, inode: int, changed: int) -> tuple[str, ...]:
    """The ids in a folder that has not changed since it was listed: every record that is read asks for them."""
    return tuple(sorted(path.stem for path in folder.glob("*.json") if _ID.fullmatch(path.stem)))


def make(root: Path) -> str:
    """The id of a folder that has at most one, made if it has none; of several processes that ask at once all get the same.

    Raises:
        OSError: The folder cannot be written.
    """
    if known := ids(root):
        return known[0]
    new = secrets.token_hex(8)
    staging = root / f"{FOLDER}.{processes.current().stamp()}"
    staging.mkdir(parents=True)
    made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    (staging / f"{new}.json").write_text(json.dumps({"made": made}) + "\n")
    with suppress(OSError):  # another process was first
        os.rename(staging, root / FOLDER)
    shutil.rmtree(staging, ignore_errors=True)
    return ids(root)[0]


def renew(root: Path) -> str:
    """One id in place of several. Errors as of `make`."""
    known = ids(root)
    if len(known) > 1:
        for name in known:
            (root / FOLDER / f"{name}.json").unlink()
        (root / FOLDER).rmdir()
    return make(root)
