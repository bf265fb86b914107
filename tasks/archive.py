"""Take files out of an untrusted archive, and make a folder appear whole or not at all."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO

from slimbench.tasks.errors import AssetError
from slimbench.util.hashing import hash_file


def check_member(name: str) -> None:
    """Raise `ValueError` if a path inside an archive would leave the folder that it is unpacked to."""
    member = PurePosixPath(name)
    if not name or member.is_absolute() or ".." in member.parts or "\\" in name:
        raise ValueError(f"'{name}' is no safe path inside an archive")


def unpack(archive: Path, members: Mapping[str, str | None], target: Path) -> None:
    """Write the wanted members of a wheel, zip or tar archive below `target` and check their hashes.

    Bytes of regular files are copied and nothing else, so links, devices, owners and modes in the archive have no effect.

    Args:
        archive: The file; its content tells its kind.
        members: Paths inside the archive, each with its SHA-256 in hex or None.
        target: Existing folder.

    Raises:
        AssetError: The archive is damaged, or a member is missing, unsafe or not the pinned one.
    """
    try:
        for name in members:
            check_member(name)
        written = set()
        for name, stream in _wanted(archive, set(members)):
            file = target / name
            file.parent.mkdir(parents=True, exist_ok=True)
            with stream, file.open("wb") as out:
                shutil.copyfileobj(stream, out, 1 << 20)
            written.add(name)
    except ValueError as error:
        raise AssetError(f"{archive.name}: {error}") from error
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise AssetError(f"{archive.name} is damaged ({error}); fetch it again") from error
    for name, sha256 in members.items():
        if name not in written:
            raise AssetError(f"{archive.name} has no file {name}")
        if sha256 and hash_file(target / name) != sha256:
            raise AssetError(f"{archive.name}: {name} is not the pinned file (SHA-256 differs)")


def _wanted(archive: Path, names: set[str]) -> Iterator[tuple[str, IO[bytes]]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for name in sorted(names.intersection(zipped.namelist())):
                yield name, zipped.open(name)
        return
    left = set(names)
    with tarfile.open(archive, mode="r|*") as tar:
        for member in tar:
            if member.name in left and member.isfile():
                stream = tar.extractfile(member)
                assert stream is not None
                yield member.name, stream
                left.discard(member.name)
            if not left:
                return
