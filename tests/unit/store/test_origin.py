"""Whose a record is: path, key and cell agree, the folder's own come first, and what was copied into it waits until it is adopted."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.record import Record
from slimbench.harness.store import origin
from slimbench.harness.store.store import Store, StoreError
from tests.support.board_records import Spec, records

GPTQ = Spec("gptq", "quantization", loss=1.3, bits=4.25)


def filled(root: Path, *specs: Spec) -> Store:
    store = Store(root)
    for spec in specs:
        for record in records(spec):
            store.put(record)
    return store


def test_a_folder_has_one_id_and_its_records_carry_it(tmp_path: Path) -> None:
    store = filled(tmp_path / "runs", Spec())
    (own,) = origin.ids(store.root)
    found, unreadable = store.scan()
    assert {record.origin for record in found} == {own} and not any(record.foreign for record in found) and not unreadable
    assert all("foreign" not in path.read_text() for path in store.files())


def test_processes_that_begin_a_folder_at_once_get_one_id(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(lambda _: origin.make(tmp_path / "runs"), range(64)))
    assert len(made) == 1 and origin.ids(tmp_path / "runs") == [*made]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".slimbench"]


def test_copied_records_are_foreign_until_they_are_adopted(tmp_path: Path) -> None:
    mine, theirs = filled(tmp_path / "mine", Spec()), filled(tmp_path / "theirs", GPTQ)
    shutil.copytree(theirs.root / "tiny-135m", mine.root / "tiny-135m", dirs_exist_ok=True)
    strangers = [record for record in mine.scan()[0] if record.foreign]
    assert {record.cell.pipeline for record in strangers} == {"gptq"} and len(strangers) == 3
    one = strangers[0]
    assert mine.get(one.cell, one.stage, one.hardware) is None, "a stage is not done by a stranger's record"
    assert mine.adopt("tiny-135m/gptq/quality-*") == 1 and sum(r.foreign for r in mine.scan()[0]) == 2
    assert mine.adopt() == 2 and mine.adopt() == 0 and not any(r.foreign for r in mine.scan()[0])
    assert mine.get(one.cell, one.stage, one.hardware)


def test_a_folder_that_another_was_copied_onto_is_nobody_s_until_one_says_so(tmp_path: Path) -> None:
    """Not even by bringing its own id along does a folder become the owner of another."""
    mine, theirs = filled(tmp_path / "mine", Spec()), filled(tmp_path / "theirs", GPTQ)
    shutil.copytree(theirs.root, mine.root, dirs_exist_ok=True)
    assert len(origin.ids(mine.root)) == 2 and all(record.foreign for record in mine.scan()[0])
    record = records(Spec())[0]
    for use in (lambda: mine.put(record), lambda: mine.lock(record.cell, record.stage, record.hardware, lambda: None).__enter__()):
        with pytest.raises(StoreError, match=r"two results folders in one: `slimbench records adopt"):
            use()
    assert mine.adopt() == 6 and len(origin.ids(mine.root)) == 1 and not any(record.foreign for record in mine.scan()[0])
    mine.put(record)


def test_records_from_before_there_were_ids_are_their_folder_s_own(tmp_path: Path) -> None:
    store = filled(tmp_path, Spec())
    for path in store.files():
        path.write_text(path.read_text().replace(f'"origin": "{origin.ids(tmp_path)[0]}"', '"origin": null'))
    assert all(record.foreign for record in store.scan()[0]), "beside an id they are copies"
    shutil.rmtree(tmp_path / origin.FOLDER)
    assert not any(record.foreign for record in store.scan()[0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"key": "of-another"}, "not to be believed: its key is of-another, its cell says "),
        ({"cell": {"model": "zzz"}}, "not to be believed: it belongs at zzz/gptq/quality-"),
        ({"cell": {"pipeline": "../\x1b[2Jx"}}, "not to be believed: it belongs at tiny-135m/"),
        ({"hardware": {"fingerprint": "ffffffff"}}, "not to be believed: it belongs at tiny-135m/gptq/quality-"),
        ({"stage": "speed"}, "not to be believed: its key is "),
    ],
)
def test_path_key_and_cell_of_a_record_agree_or_it_is_not_believed(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    store = filled(tmp_path, GPTQ)
    (good,) = [record for record in store.scan()[0] if record.stage is Stage.QUALITY]
    path = store.path(good.cell, good.stage, good.hardware)
    data = json.loads(path.read_text())
    for name, value in change.items():
        data[name] = data[name] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(data))
    found, unreadable = store.scan()
    assert len(found) == 2 and [fault.path for fault in unreadable] == [path.relative_to(tmp_path).as_posix()]
    assert unreadable[0].reason.startswith(reason) and "\n" not in unreadable[0].reason and "\x1b" not in unreadable[0].reason
    assert store.get(good.cell, good.stage, good.hardware) is None
    store.put(Record.model_validate(good.model_dump()))
    assert store.get(good.cell, good.stage, good.hardware) and path.with_suffix(".json.unreadable").exists()
