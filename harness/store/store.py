"""The results folder: one JSON file for each record, whose path is its identity.

`RESULTS/<model>/<pipeline>/<stage>-<task key>-<hardware fingerprint>.json`. Records are written atomically (temporary file,
fsync, rename), so a reader never sees half of one, and folders from any number of machines merge by copying. What many records hold
alike lies beside them once (`harness.store.shared`).
"""

from __future__ import annotations

import itertools
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError
from pydantic_core import to_json

from slimbench.harness.schema.former.migrations import migrate
from slimbench.harness.schema.hardware import HardwareIdentity
from slimbench.harness.schema.identity import CellIdentity, Stage
from slimbench.harness.schema.record import NAMED_KEYS, SCHEMA_VERSION, Record
from slimbench.harness.store import leftovers, origin, shared
from slimbench.harness.store.decode import decode
from slimbench.harness.store.leftovers import LOCKS
from slimbench.util import locks
from slimbench.util.files import read_patiently, write_atomically
from slimbench.util.locks import PACE, Lock, Owner, Pace
from slimbench.util.text import one_line, slug

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


UNREADABLE = ".unreadable"
_LOCK_NAME = re.compile(r"[a-z]+-[^/]+-[^-/]+")


class StoreError(Exception):
    """The results folder cannot be used; the message is one line."""


class Superseded(Exception):
    """A stage was suspended for so long that another process took it over: its record is that one's to make."""


@dataclass(frozen=True)
class Unreadable:
    """A file that should be a record and is not. `path` is relative to the results folder."""

    path: str
    reason: str


def dump(record: Record) -> bytes:
    """A record as JSON, whole: as it travels alone."""
    return record.model_dump_json(indent=1, exclude_none=True).encode() + b"\n"


class Store:
    """A folder of records.

    Args:
        root: The results folder; made when the first record is written.
        pace: Of its locks.
    """

    def __init__(self, root: Path, pace: Pace = PACE) -> None:
        self.root, self.pace = root, pace
        self._locks: dict[Path, Lock] = {}
        self._is_swept = False

    def path(self, cell: CellIdentity, stage: Stage, hardware: HardwareIdentity) -> Path:
        name = f"{stage.value}-{slug(cell.keys.of(stage))}-{slug(hardware.fingerprint)}.json"
        return self.root.joinpath(slug(cell.model), slug(cell.pipeline), name)

    def get(self, cell: CellIdentity, stage: Stage, hardware: HardwareIdentity) -> Record | None:
        """The folder's own record of a stage on some hardware, or None. A file that cannot be believed counts as absent.

        Raises:
            StoreError: There is one that this program must not take for absent: of a newer version, or not readable at present.
        """
        path = self.path(cell, stage, hardware)
        record = self._believed(path, self._present(path), origin.ids(self.root))
        return record if isinstance(record, Record) and not record.foreign else None

    def _present(self, path: Path) -> Record | str:
        """As `read`. Errors as of `get`."""
        try:
            content = read_patiently(path)
            record = parse(content, shared.folder_of(path))
        except FileNotFoundError:
            return "absent"
        except OSError as error:
            raise StoreError(f"cannot read the record {path}: {error.strerror or error}") from error
        if isinstance(record, str) and _is_newer(content):
            raise StoreError(f"the record {path} is of a newer version of slimbench; update this one, or give another --results")
        return record

    def elsewhere(self, cell: CellIdentity, stage: Stage, hardware: HardwareIdentity) -> list[Record]:
        """The records of a stage on all other hardware, the newest first."""
        own = self.path(cell, stage, hardware)
        paths = own.parent.glob(f"{stage.value}-{slug(cell.keys.of(stage))}-*.json")
        ids = origin.ids(self.root)
        found = [self._believed(path, read(path), ids) for path in paths if path != own]
        records = [record for record in found if isinstance(record, Record) and not record.foreign]
        return sorted(records, key=lambda record: (record.started, record.hardware.fingerprint), reverse=True)

    def put(self, record: Record) -> Path:
        """Write a record as the folder's own, replacing one of the same key. What cannot be read under its name is moved aside and kept.

        Args:
            record: Its `origin` becomes the id of the folder.

        Raises:
            Superseded: The lock of its stage was held by this store and taken over meanwhile; nothing was written.
            StoreError: The folder is not writable or the disk is full, and nothing was changed; or it has several ids.
        """
        record.origin, record.foreign = self.claim(), False
        lock = self._locks.get(self._lock_path(record.cell, record.stage, record.hardware))
        try:
            if lock is not None and not lock.is_held():
                raise Superseded(f"{record.stage} of {record.cell.model} was taken over by another process")
        except OSError as error:
            raise StoreError(f"cannot use the results folder {self.root}: {error.strerror or error}") from error
        return self._put(record)

    def receive(self, record: Record) -> Path:
        """Write a record that was made elsewhere; it stays foreign until it is adopted. Errors as of `put`."""
        own = self.claim()
        record.origin, record.foreign = None if record.origin == own else record.origin, True
        return self._put(record)

    def adopt(self, pattern: str = "*") -> int:
        """Make foreign records the folder's own, and return how many.

        Args:
            pattern: Of paths in the folder, such as `smollm2-135m/*`.

        Raises:
            StoreError: The folder is not writable.
        """
        try:
            own = origin.renew(self.root)
            foreign = [record for record in self.scan()[0] if record.foreign]
            paths = {self.path(record.cell, record.stage, record.hardware): record for record in foreign}
            chosen = {path: record for path, record in paths.items() if fnmatch(path.relative_to(self.root).as_posix(), pattern)}
            for path, record in chosen.items():
                write(path, record.model_copy(update={"origin": own}))
        except OSError as error:
            raise StoreError(f"cannot write into {self.root}: {error.strerror or error}") from error
        return len(chosen)

    def claim(self) -> str:
        """The id of the folder, made if it has none.

        Raises:
            StoreError: The folder is not writable, or it has several ids as one folder was copied onto another.
        """
        if len(origin.ids(self.root)) > 1:
            raise StoreError(f"{self.root} is two results folders in one: `slimbench records adopt --results {self.root}` makes it one")
        try:
            return origin.make(self.root)
        except OSError as error:
            raise StoreError(f"cannot use the results folder {self.root}: {error.strerror or error}") from error

    def _put(self, record: Record) -> Path:
        path = self.path(record.cell, record.stage, record.hardware)
        try:
            if isinstance(self._believed(path, self._present(path), []), str):
                _set_aside(path)
            write(path, record)
        except OSError as error:
            raise StoreError(f"cannot write the record {path}: {error.strerror or error}") from error
        return path

    @contextmanager
    def lock(self, cell: CellIdentity, stage: Stage, hardware: HardwareIdentity, wait: bool = False) -> Iterator[bool]:
        """Keep other sweeps on this folder from running the same stage on the same hardware at the same time.

        The lock is taken over when its process is gone, however it ended. Its value tells whether it was got: false where
        another process holds it. With `wait` it is waited for; afterwards the caller should look for the record again.

        Raises:
            StoreError: The folder cannot be written.
        """
        self.claim()
        if not self._is_swept:
            self._is_swept = True
            leftovers.sweep(self.root)
        path = self._lock_path(cell, stage, hardware)
        lock = Lock(path, self.pace)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            mine = lock.acquire(wait)
        except OSError as error:
            raise StoreError(f"cannot use the results folder {self.root}: {error.strerror or error}") from error
        if not mine:
            yield False
            return
        self._locks[path] = lock
        try:
            yield True
        finally:
            self._locks.pop(path, None)
            lock.release()

    def holders(self) -> dict[str, Owner]:
        """Who is at which task, by its name `<stage>-<key>`; those that are known to be gone are left out."""
        owners = locks.owners(self.root / LOCKS)
        return {name.rpartition("-")[0]: owner for name, owner in owners.items() if _LOCK_NAME.fullmatch(name)}

    def _lock_path(self, cell: CellIdentity, stage: Stage, hardware: HardwareIdentity) -> Path:
        return self.root / LOCKS / f"{stage.value}-{slug(cell.keys.of(stage))}-{slug(hardware.fingerprint)}"

    def files(self) -> list[Path]:
        """Every file that should be a record, sorted."""
        endings = (".json", f".json{UNREADABLE}")
        found = (path for path in self.root.glob("*/*/*") if path.name.endswith(endings))
        return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(self.root).parts))

    def scan(self, reader: Callable[[Path], Record | str] | None = None) -> tuple[list[Record], list[Unreadable]]:
        """Every record of the folder, sorted by path, and every file that should be one and is not.

        Args:
            reader: Reads one file; `read` unless another is given.
        """
        records: list[Record] = []
        unreadable: list[Unreadable] = []
        own = origin.ids(self.root)
        for path in self.files():
            record = self._believed(path, (reader or read)(path), own)
            if isinstance(record, Record) and path.suffix == UNREADABLE:
                record = "set aside when it could not be read, which it can now: rename it to take it"
            if isinstance(record, Record):
                records.append(record)
            else:
                unreadable.append(Unreadable(one_line(path.relative_to(self.root).as_posix()), record))
        return records, unreadable

    def _believed(self, path: Path, record: Record | str, ids: list[str]) -> Record | str:
        """A record whose path, key and cell agree, with whether it is foreign; else one line that says what differs.

        Args:
            ids: Those of the folder. Where it has none, what has no origin is its own: it is from before there were ids.
        """
        if isinstance(record, str):
            return record
        if record.key != (key := record.cell.keys.of(record.stage)):
            return one_line(f"not to be believed: its key is {record.key}, its cell says {key}")
        place = self.path(record.cell, record.stage, record.hardware)
        if record.schema_version < NAMED_KEYS:
            place = place.with_name(f"{record.stage.value}-{slug(record.key)}.json")
        if path.with_name(path.name.removesuffix(UNREADABLE)) != place:
            return one_line(f"not to be believed: it belongs at {place.relative_to(self.root).as_posix()}")
        record.foreign = [record.origin] != ids if ids else record.origin is not None
        return record


def write(path: Path, record: Record) -> None:
    """Write the file of a record, after the shared parts that it names.

    Args:
        path: RESULTS/<model>/<pipeline>/<file>.
    """
    data = record.model_dump(mode="json", exclude_none=True)
    for name, content in shared.split(data).items():
        part = shared.folder_of(path) / f"{name}.json"
        if not shared.is_current(part, content):
            write_atomically(part, content)
    write_atomically(path, to_json(data, indent=1, inf_nan_mode="null") + b"\n")


def _set_aside(path: Path) -> None:
    """Keep a file that cannot be believed under a name that no other has, if there is one."""
    for number in itertools.count(1):
        name = f"{path.stem}{f'.{number}' * (number > 1)}.json{UNREADABLE}"
        try:
            os.link(path, path.with_name(name))
        except FileExistsError:
            continue
        except FileNotFoundError:
            return
        path.unlink()
        return


def _is_newer(content: bytes) -> bool:
    try:
        return int(decode(content)["schema_version"]) > SCHEMA_VERSION
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return False


def read(path: Path) -> Record | str:
    """The record in a file, or one line that says why there is none."""
    try:
        return parse(read_patiently(path), shared.folder_of(path))
    except OSError as error:
        return f"not a record: {error.strerror or error}"


def parse(content: bytes, parts: Path | None = None) -> Record | str:
    """The record in a JSON text, or one line that says why there is none.

    Args:
        parts: Folder of what it shares with other records; None where it has to be whole.

    Raises:
        OSError: A shared part is there and cannot be read at present.
    """
    try:
        return Record.model_validate(migrate(shared.join(decode(content), parts)))
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        return one_line(": ".join(["not a valid record", *([".".join(map(str, fault["loc"]))] if fault["loc"] else []), fault["msg"]]))
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        return one_line(f"not a record: {error}")
