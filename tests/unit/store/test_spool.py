"""A record that did not get into its folder is put later, once, and never over a newer one."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimbench.harness.schema.record import Record
from slimbench.harness.store import spool
from slimbench.harness.store import store as stores
from slimbench.harness.store.store import Store
from tests.support.board_records import Spec, records


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("SLIMBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(spool.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    folder = Store(tmp_path / "results")
    folder.claim()
    return folder


def deliver(store: Store, record: Record) -> Record | None:
    return spool.deliver(store, record.cell, record.stage, record.hardware)


def test_a_record_is_kept_and_put_later(store: Store) -> None:
    record = records(Spec())[1]
    path = spool.keep(store, record)
    assert path and path.is_file() and not store.files()
    delivered = deliver(store, record)
    assert delivered == store.get(record.cell, record.stage, record.hardware) and delivered and delivered.quality == record.quality
    assert not path.exists() and deliver(store, record) is None


def test_where_the_cache_is_full_too_it_goes_to_the_folder_for_temporary_files(store: Store, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    record = records(Spec())[1]
    path = spool.keep(store, record)
    assert path and path.is_relative_to(tmp_path / "temporary")
    assert deliver(store, record)
    (tmp_path / "temporary").rename(tmp_path / "gone")
    (tmp_path / "temporary").write_text("no folder")
    assert spool.keep(store, record) is None


def test_a_newer_record_stays_and_what_cannot_be_read_goes(store: Store) -> None:
    record = records(Spec())[1]
    newer = record.model_copy(update={"started": "2999-01-01T00:00:00.000+00:00"})
    spool.keep(store, record)
    store.put(newer)
    assert deliver(store, record) is None and store.get(record.cell, record.stage, record.hardware) == newer
    path = spool.keep(store, record)
    assert path
    path.write_text("{")
    assert deliver(store, record) is None and not path.exists()


def test_while_the_folder_has_no_room_it_stays_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    record = records(Spec())[1]
    path = spool.keep(store, record)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(stores, "write", full)
        with pytest.raises(stores.StoreError, match="No space left"):
            deliver(store, record)
    assert path and path.exists() and deliver(store, record)
