"""What records share is stored once, and nobody above the store can tell."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from slimbench.harness.schema.record import SCHEMA_VERSION, Record
from slimbench.harness.store import shared, store
from slimbench.harness.store.store import Store, StoreError, dump, parse, read
from slimbench.leaderboard.exchange import parquet
from slimbench.leaderboard.rows.reading import lean
from tests.support.board_records import Spec, board, records
from tests.support.paths import ROOT


def _parts(root: Path) -> list[Path]:
    return sorted((root / shared.FOLDER).iterdir())


def _record_with_parts(root: Path) -> tuple[Record, Path]:
    record = records(Spec())[1]
    return record, Store(root).put(record)


def test_a_board_holds_each_list_once(tmp_path: Path) -> None:
    made = board()
    for record in made:
        Store(tmp_path).put(record)
    assert [path.name.partition("-")[0] for path in _parts(tmp_path)] == ["items"] * 3 + ["packages"], "three tasks, one environment"
    assert sorted(map(dump, Store(tmp_path).scan()[0])) == sorted(map(dump, made))
    for path in Store(tmp_path).files():
        data = json.loads(path.read_text())
        assert list(data["provenance"]["packages"]) == [shared.REFERENCE]
        assert all("ids" not in task["items"] for task in data.get("quality", {}).get("zeroshot", []))


def test_every_number_of_the_records_of_reference_comes_back_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    old, copied = Store(ROOT / "results"), tmp_path / "results"
    for path in old.files():
        record = read(path)
        assert isinstance(record, Record)
        record.schema_version = SCHEMA_VERSION
        place = copied / path.relative_to(old.root)
        store.write(place, record)
        again, light = read(place), lean(place)
        assert isinstance(again, Record) and dump(again) == dump(record)
        assert isinstance(light, Record) and light.provenance == record.provenance
    assert [path.name for path in _parts(copied)] == [path.name for path in _parts(old.root)], "each once, and none that no record has"


def test_folders_merge_by_copying(tmp_path: Path) -> None:
    left, right = board()[:20], board()[20:]
    for name, part in (("left", left), ("right", right)):
        for record in part:
            Store(tmp_path / name).put(record)
    shutil.copytree(tmp_path / "right", tmp_path / "left", dirs_exist_ok=True)
    found, unreadable = Store(tmp_path / "left").scan()
    assert not unreadable and sorted(map(dump, found)) == sorted(map(dump, left + right))


def _forge(text: str) -> Callable[[Path, Path], None]:
    return lambda part, record: record.write_text(record.read_text().replace(part.stem, text))


@pytest.mark.parametrize(
    ("break_", "says"),
    [
        (lambda part, record: part.unlink(), "cannot be read: No such file or directory"),
        (lambda part, record: part.write_bytes(part.read_bytes().replace(b"2.13.0", b"2.13.1")), "is not what its name says"),
        (lambda part, record: part.write_bytes(part.read_bytes()[:-9]), "is not what its name says"),
        (_forge("../../../../etc/passwd"), "is no name of a shared part"),
        (_forge("packages-" + "0" * 32), "cannot be read: No such file or directory"),
        (_forge("packages-"), "is no name of a shared part"),
    ],
)
def test_a_record_whose_part_is_gone_or_changed_is_unreadable(break_: Callable[[Path, Path], None], says: str, tmp_path: Path) -> None:
    record, path = _record_with_parts(tmp_path)
    assert read(path) == record
    (packages,) = (part for part in _parts(tmp_path) if part.name.startswith("packages"))
    break_(packages, path)
    for reader in (read, lean):
        reason = reader(path)
        assert isinstance(reason, str) and says in reason and "\n" not in reason
    assert len(Store(tmp_path).scan()[1]) == 1
    Store(tmp_path).put(record)
    assert read(path) == record, "who writes it again mends it"


def test_parts_are_there_before_the_record_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    write = store.write_atomically
    monkeypatch.setattr(store, "write_atomically", lambda path, content: (order.append(path.parent.name), write(path, content)))
    record, _ = _record_with_parts(tmp_path)
    assert order == [shared.FOLDER] * 4 + ["dense"]
    Store(tmp_path).put(record)
    assert order[5:] == ["dense"], "what is there already is not written again"


def test_a_full_disk_leaves_no_record_without_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        _record_with_parts(tmp_path)
    assert Store(tmp_path).files() == []


def test_a_record_that_travels_alone_is_whole(tmp_path: Path) -> None:
    record, path = _record_with_parts(tmp_path)
    (tmp_path / "x.parquet").write_bytes(parquet.of_records(Store(tmp_path).scan()[0]))
    assert parquet.to_records(tmp_path / "x.parquet") == [record]
    assert "is not in it" in str(parse(path.read_bytes())), "a file of the store is no record alone"


def test_what_is_done_to_one_record_is_not_done_to_others(tmp_path: Path) -> None:
    record, path = _record_with_parts(tmp_path)
    first = read(path)
    assert isinstance(first, Record)
    first.provenance["packages"]["torch"] = "0"
    assert read(path) == record
