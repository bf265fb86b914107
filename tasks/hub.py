"""The hub's data sets, in the libraries' own caches, and patience with a hub that fails: bounded tries, then an error that says so."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from slimbench.tasks.errors import DataError, HubError

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T")

_COMMIT = re.compile("[0-9a-f]{40}")
_WAITS_S = (1.0, 4.0, 16.0)  # before each further try
_LONGEST_WAIT_S = 120.0  # of those that the hub asks for
_BUSY = (408, 429, 500, 502, 503, 504)


def patiently(what: str, call: Callable[[], T]) -> T:
    """The result of a call that asks the hub; tried again where the hub is busy or the connection broke.

    Args:
        what: What is fetched, for the message.

    Raises:
        HubError: It failed so each time.
        DataError: The hub answers that it cannot be had, or nothing may be asked and it is not in the cache.
    """
    for further in (*_WAITS_S, None):
        try:
            return call()
        except DataError:
            raise
        except Exception as error:  # the libraries raise many kinds, for network, name, configuration and split
            reason = _first_line(error)
            if (asked := _wait_asked_for(error)) is None:
                raise DataError(f"cannot fetch {what}: {reason}") from error
            if further is None:
                raise HubError(f"cannot fetch {what}: {reason}; tried {len(_WAITS_S) + 1} times") from error
        time.sleep(min(max(asked, further), _LONGEST_WAIT_S))
    raise AssertionError


def rows(path: str, name: str | None, split: str, revision: str | None = None) -> Dataset:
    """Rows of a split. A name with a slash is a data file inside the data set, which needs no other; else it is a configuration.

    Raises:
        DataError: See `patiently`.
    """
    from datasets import load_dataset

    if name is None or "/" not in name:
        loaded: Dataset = patiently(f"data set {path}", lambda: load_dataset(path, name, split=split, revision=revision))
        return loaded
    file = data_file(path, name, revision)
    files = {split.partition("[")[0]: file.name}
    loaded = patiently(f"{name} of data set {path}", lambda: load_dataset(str(file.parent), data_files=files, split=split))
    return loaded


def is_fetched(path: str, name: str | None, revision: str | None = None) -> bool:
    """Whether `rows` finds a configuration or data file where nothing may be asked."""
    if name is None or "/" not in name or os.path.isdir(path):
        return is_prepared(path, name, revision)
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(path, name, repo_type="dataset", revision=revision), str)


def is_prepared(path: str, name: str | None, revision: str | None = None, settings: Mapping[str, Any] | None = None) -> bool:
    """Whether a configuration lies in the cache of `datasets`; of that commit, if one is given."""
    from slimbench.util.compat.datasets import cached_hash

    found = os.path.isdir(path) or cached_hash(path, name, dict(settings or {}))
    return bool(found) and (not is_commit(revision) or found in (True, revision))


def size(path: str, name: str | None, revision: str | None = None, settings: Mapping[str, Any] | None = None) -> int | None:
    """Bytes of a data file, or of all files of a configuration; None where the hub does not tell."""
    from datasets import load_dataset_builder
    from huggingface_hub import HfFileSystem

    try:
        if name and "/" in name:
            files = [f"datasets/{path}@{quote(revision or 'main', safe='')}/{name}"]
        else:
            parts = load_dataset_builder(path, name, revision=revision, **dict(settings or {})).config.data_files
            files = [file for split in (parts or {}).values() for file in split]
        return sum(HfFileSystem().info(file)["size"] for file in files)
    except Exception:  # whatever keeps it from being told, fetching it says why
        return None


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a commit in full, which never moves."""
    return bool(revision and _COMMIT.fullmatch(revision))


def data_file(path: str, name: str, revision: str | None = None) -> Path:
    """A file of a data set, from the hub's cache or fetched into it; `path` may be a folder."""
    from huggingface_hub import hf_hub_download

    if os.path.isdir(path):
        if not (file := Path(path) / name).is_file():
            raise DataError(f"cannot load '{name}': there is no such file in {path}")
        return file
    return Path(patiently(f"{name} of data set {path}", lambda: hf_hub_download(path, name, repo_type="dataset", revision=revision)))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it arose from, the latter first told by `raise … from`."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _wait_asked_for(error: BaseException) -> float | None:
    """Seconds to wait before the same may be tried again, 0 if none are asked for; None where no further try can help."""
    import httpx
    from huggingface_hub.errors import OfflineModeIsEnabled

    causes = list(_chain(error))
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return None
    for cause in causes:
        response: Any = getattr(cause, "response", None)
        if isinstance(response, httpx.Response):
            if response.status_code not in _BUSY:
                return None
            asked = response.headers.get("Retry-After", "")
            return float(asked) if asked.isdigit() else 0.0
    broken = any(_is_of_the_network(cause) or "Consistency check failed" in str(cause) for cause in causes)
    return 0.0 if broken else None


def _is_of_the_network(error: BaseException) -> bool:
    import httpx

    return isinstance(error, httpx.TransportError) and not isinstance(error, httpx.UnsupportedProtocol)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
