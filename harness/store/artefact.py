"""The artefact folder: a compressed model on disk with a manifest, content-addressed and written atomically."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel

from slimbench.harness.schema.compress import ArtefactFile, Spent
from slimbench.methods.base import Claim
from slimbench.util import checksums
from slimbench.util.files import cache_dir, replace_folder
from slimbench.util.hashing import hash_file

MANIFEST = "artefact.json"


class Manifest(BaseModel):
    """What the artefact says of itself.

    Attributes:
        key: Compress key of the model and steps it was made from.
        claim: What the methods say that they wrote.
        code: Hash of the code behind each method that made it, by kind and name (see `harness.config.lock`).
        files: Its files with their hashes, as they were published.
        step_seconds: Wall time of each step.
        spent: What making it took, all steps together.
        dense_parameters: In the matrices of the model that it was made from; None in what older versions made.
    """

    key: str
    model: str
    pipeline: list[dict[str, Any]]
    claim: Claim
    code: dict[str, str] = {}
    files: list[ArtefactFile] = []
    step_seconds: dict[str, float] = {}
    spent: Spent = Spent()
    dense_parameters: int | None = None


class Damaged(Exception):
    """An artefact is not the bytes that were published; the message is one line."""


def location(key: str) -> Path:
    """Where the artefact of a compress key lies."""
    return cache_dir() / "artefacts" / key


def checkpoints(key: str, step: int) -> Path:
    """Where a step of a pipeline keeps what it resumes from; the folder is made by who writes into it and removed when the step is done."""
    return cache_dir() / "checkpoints" / f"{key}-{step}"


def exists(key: str) -> bool:
    return (location(key) / MANIFEST).is_file()


def fault(key: str) -> str | None:
    """Why the artefact of a key is not to be used, in a few words, or None where its files are those that were published.

    Sizes and times are looked at each time; a file is hashed where one of them moved.
    """
    if not exists(key):
        return "it is not in the cache"
    folder = location(key)
    if problem := damage(folder):
        return problem
    own = {file.name for file in read_manifest(folder).files}
    strange = next((name for path in _content(folder) if (name := path.relative_to(folder).as_posix()) not in own), None)
    return f"{strange} does not belong to it" if strange else None


def damage(folder: Path) -> str | None:
    """Where the files of an artefact's folder are not those of its manifest, in a few words, or None; other files may lie beside them."""
    try:
        files = read_manifest(folder).files
    except (OSError, ValueError):
        return "its manifest cannot be read"
    return checksums.fault(folder, {file.name: str(file.sha256) for file in files}) if files else "it has no hashes"


def opened(key: str) -> Path:
    """The folder of an artefact that is about to be loaded.

    Raises:
        Damaged: Its files are not those that were published.
    """
    if problem := fault(key):
        raise Damaged(f"the artefact is not to be used: {problem}")
    return location(key)


def unlike(key: str, recorded: Iterable[ArtefactFile]) -> str | None:
    """Where the files of an artefact and those of its compress record differ, in a few words, or None; without hashes nothing is said."""
    here = {file.name: file.sha256 for file in read_manifest(location(key)).files}
    there = {file.name: file.sha256 for file in recorded}
    if None in there.values() or here == there:
        return None
    name = next(name for name in sorted(here | there) if here.get(name) != there.get(name))
    now, then = ((hashes.get(name) or "missing")[:8] for hashes in (here, there))
    return f"{name} is {now}, and {then} in the record"


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
    """Hash the files, write the manifest and move the folder to its place, replacing an older artefact of the same key."""
    manifest = manifest.model_copy(update={"files": files(folder)})
    write_manifest(folder, manifest)
    target = location(manifest.key)
    replace_folder(folder, target)
    for file in manifest.files:
        checksums.remember(target / file.name, str(file.sha256))
    return target


def _sweep(root: Path) -> None:
    """Remove what dead processes of this host left behind."""
    for path in root.glob(".*"):
        name, _, tail = path.name.rpartition(".")
        if ".old-" in path.name or (tail.isdigit() and name.endswith("." + socket.gethostname()) and not psutil.pid_exists(int(tail))):
            shutil.rmtree(path, ignore_errors=True)
