"""The artefact folder: a compressed model on disk with a manifest, content-addressed and written atomically."""

from __future__ import annotations

import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel

from slimbench.harness.schema.compress import ArtefactFile
from slimbench.methods.base import Claim
from slimbench.util.files import cache_dir
from slimbench.util.hashing import hash_file

MANIFEST = "artefact.json"


class Manifest(BaseModel):
    """What the artefact says of itself: its key, the model and steps it was made from, and the method's claim."""

    key: str
    model: str
    pipeline: list[dict[str, Any]]
    claim: Claim


def location(key: str) -> Path:
    """Where the artefact of a compress key lies."""
    return cache_dir() / "artefacts" / key


def checkpoints(key: str, step: int) -> Path:
    """Where a step of a pipeline keeps what it resumes from; the folder is made by who writes into it and removed when the step is done."""
    return cache_dir() / "checkpoints" / f"{key}-{step}"


def exists(key: str) -> bool:
    return (location(key) / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    return Manifest.model_validate_json((folder / MANIFEST).read_text())


def files(folder: Path) -> list[ArtefactFile]:
    """The files of an artefact with their sizes in bytes and hashes, its manifest left out."""
    found = sorted(_content(folder))
    return [ArtefactFile(name=p.relative_to(folder).as_posix(), bytes=p.stat().st_size, sha256=hash_file(p)) for p in found]


def disk_bytes(folder: Path) -> int:
    """Bytes of the files of an artefact, its manifest left out."""
    return sum(path.stat().st_size for path in _content(folder))


def _content(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


@contextmanager
def staging(key: str) -> Iterator[Path]:
    """An empty folder that is thrown away, whatever happens; `publish` moves what was made in it into place.

    Its name tells host and process, so that what a killed process left behind is recognised and removed.
    """
    root = cache_dir() / "artefacts"
    root.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    folder = root / f".{key}.{socket.gethostname()}.{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1))


def publish(folder: Path, manifest: Manifest) -> Path:
    """Write the manifest and move the folder to its place, replacing an older artefact of the same key."""
    write_manifest(folder, manifest)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    target = location(manifest.key)
    if target.exists():
        old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex}")
        os.replace(target, old)
        os.replace(folder, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(folder, target)
    return target


def _sweep(root: Path) -> None:
    """Remove what dead processes of this host left behind."""
    for path in root.glob(".*"):
        name, _, tail = path.name.rpartition(".")
        if ".old-" in path.name or (tail.isdigit() and name.endswith("." + socket.gethostname()) and not psutil.pid_exists(int(tail))):
            shutil.rmtree(path, ignore_errors=True)
