"""Artefacts: compressed models on disk, each published once under the SHA-256 of what it is, and never changed.

    CACHE/objects/<SHA-256 of the manifest, which holds those of the files>/    the files, read-only, and the manifest
    CACHE/artefacts/<compress key>                                             a symbolic link to it, replaced in one step

So two that publish under one key never fail and never show a moment without an artefact, and who has opened one reads it to the end. Older
versions kept the folder itself under its key; it is read as before.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from slimbench.harness.schema.compress import ArtefactFile, Spent
from slimbench.harness.store import scratch
from slimbench.methods.base import Claim
from slimbench.util import checksums, processes
from slimbench.util.files import beside, cache_dir, point, remove, replace_folder, set_modes, sweep, write_atomically
from slimbench.util.hashing import hash_file
from slimbench.util.text import one_line

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
    """Where the artefact of a compress key is found."""
    return cache_dir() / "artefacts" / key


def objects() -> Path:
    """Where the files of all artefacts lie."""
    return cache_dir() / "objects"


def object_of(key: str) -> Path:
    """The folder that the key of an artefact stands for now; it never changes."""
    try:
        name = Path(os.readlink(location(key))).name
    except OSError:  # a folder of an older version
        return location(key)
    return objects() / name


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
    folder = object_of(key)
    if problem := damage(folder):
        return problem
    manifest = read_manifest(folder)
    if manifest.key != key:
        return f"it is that of another key, {one_line(manifest.key)[:80]}"
    own = {file.name for file in manifest.files}
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
    """The folder of an artefact that is about to be loaded: a copy on this node where `$SLIMBENCH_SCRATCH` asks for one.

    Raises:
        Damaged: Its files are not those that were published.
    """
    if problem := fault(key):
        raise Damaged(f"the artefact is not to be used: {problem}")
    folder = object_of(key)
    with suppress(OSError):  # of another user, or a cache that cannot be written
        os.utime(folder)
    return scratch.copy_of(folder, {file.name: str(file.sha256) for file in read_manifest(folder).files}, MANIFEST)


def discard(key: str) -> None:
    """Remove an artefact."""
    folder = object_of(key)
    remove(location(key))
    remove(folder)


def unlike(key: str, recorded: Iterable[ArtefactFile]) -> str | None:
    """Where the files of an artefact and those of its compress record differ, in a few words, or None; without hashes nothing is said."""
    here = {file.name: file.sha256 for file in read_manifest(object_of(key)).files}
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
    """An empty folder that is thrown away, whatever happens; `publish` moves what was made in it into place."""
    root = location(key).parent
    root.mkdir(parents=True, exist_ok=True)
    sweep(root)
    folder = beside(location(key))
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_staged(key: str) -> bool:
    """Whether a process that may live is making the artefact of a key."""
    staged = (processes.of_name(path.name) for path in location(key).parent.glob(f".{key}.*"))
    return any(process is not None and not process.is_gone() for process in staged)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_atomically(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())


def publish(folder: Path, manifest: Manifest) -> Path:
    """Hash the files, write the manifest and move the folder to its place; what the key stood for before stays for who reads it."""
    manifest = manifest.model_copy(update={"files": files(folder)})
    _share(folder, manifest.files, object_of(manifest.key))
    write_manifest(folder, manifest)
    set_modes(folder, 0o444)
    target = objects() / hash_file(folder / MANIFEST)
    target.parent.mkdir(parents=True, exist_ok=True)
    if damage(target):
        replace_folder(folder, target)
    for file in manifest.files:
        checksums.remember(target / file.name, str(file.sha256))
    link, old = location(manifest.key), beside(location(manifest.key))
    if link.is_dir() and not link.is_symlink():
        os.replace(link, old)
    point(link, f"../{objects().name}/{target.name}")
    remove(old)
    return target


def _share(folder: Path, made: Iterable[ArtefactFile], former: Path) -> None:
    """Let files that the former artefact of a key has, too, be its files under a second name: the same again takes no room."""
    if damage(former):
        return
    known = {(file.name, file.sha256) for file in read_manifest(former).files}
    for name in (file.name for file in made if (file.name, file.sha256) in known):
        if not os.path.samefile(former / name, folder / name):
            again = beside(folder / name)
            with suppress(OSError):
                os.link(former / name, again)
                os.replace(again, folder / name)


def unnamed() -> list[Path]:
    """Objects that no key stands for."""
    named = {object_of(path.name) for path in (cache_dir() / "artefacts").glob("[!.]*")}
    return sorted(path for path in objects().glob("*") if path not in named)
