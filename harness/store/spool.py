"""Records that did not get into their results folder, as it was full or gone: kept elsewhere, and put by the next run.

They wait in the cache, or in the folder for temporary files where that is full too, below the id of their results folder.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from slimbench.harness.schema.hardware import HardwareIdentity
from slimbench.harness.schema.identity import CellIdentity, Stage
from slimbench.harness.schema.record import Record
from slimbench.harness.store import origin
from slimbench.harness.store.store import Store, dump, parse
from slimbench.util.files import cache_dir, write_atomically


def keep(store: Store, record: Record) -> Path | None:
    """Write a record beside its folder; where, or None if there was no room anywhere."""
    for path in _places(store, record.cell, record.stage, record.hardware):
        with contextlib.suppress(OSError):
            write_atomically(path, dump(record))
            return path
    return None


def deliver(store: Store, cell: CellIdentity, stage: Stage, hardware: HardwareIdentity) -> Record | None:
    """Put a record that was kept, unless the folder has a newer one, and return it. To be called with the stage's lock held.

    Raises:
        harness.store.store.StoreError: The folder still has no room; the record stays where it is.
    """
    for path in _places(store, cell, stage, hardware):
        try:
            record = parse(path.read_bytes())
        except OSError:
            continue
        known = store.get(cell, stage, hardware)
        delivered = record if isinstance(record, Record) and (known is None or known.started < record.started) else None
        if delivered:
            store.put(delivered)
        with contextlib.suppress(OSError):
            path.unlink()
        if delivered:
            return delivered
    return None


def _places(store: Store, cell: CellIdentity, stage: Stage, hardware: HardwareIdentity) -> Iterator[Path]:
    if len(ids := origin.ids(store.root)) != 1:
        return
    name = Path(ids[0], store.path(cell, stage, hardware).name)
    yield cache_dir() / "records" / name
    yield Path(tempfile.gettempdir(), f"slimbench-records-{os.getuid()}") / name
