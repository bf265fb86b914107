"""The results folder: atomic, forgiving, never losing anything."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.record import SCHEMA_VERSION, Record
from slimbench.harness.store.shared import _checked as checked
from slimbench.harness.store.store import Store, StoreError, Superseded, dump, read
from slimbench.leaderboard.rows.reading import lean
from slimbench.util import processes
from slimbench.util.locks import Pace
from slimbench.util.text import slug
from tests.support.board_records import Spec, compress_record, records


@pytest.fixture
def record() -> Record:
    return compress_record()


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path, record: Record) -> None:
    store = Store(tmp_path)
    path = store.put(record)
    assert path.relative_to(tmp_path).parts[0] == slug(record.cell.model)
    assert store.get(record.cell, Stage.COMPRESS, record.hardware) == record
    assert store.scan() == ([record], [])


def test_an_unreadable_record_is_kept_aside_and_listed(tmp_path: Path, record: Record) -> None:
    store = Store(tmp_path)
    path = store.put(record)
    path.write_text(path.read_text()[:100])
    assert len(store.scan()[1]) == 1
    assert store.get(record.cell, Stage.COMPRESS, record.hardware) is None
    assert path.exists(), "reading changes nothing"
    store.put(record)
    assert path.with_suffix(".json.unreadable").exists()
    records, unreadable = store.scan()
    assert (len(records), len(unreadable)) == (1, 1)


def test_a_newer_schema_is_unreadable_with_the_reason(tmp_path: Path, record: Record) -> None:
    store = Store(tmp_path)
    store.put(record.model_copy(update={"schema_version": SCHEMA_VERSION + 1}))
    assert "newer" in store.scan()[1][0].reason


def _of_schema_2(record: Record) -> dict[str, Any]:
    """A record as schema 2 wrote it: a list of items for each task."""
    data = json.loads(dump(record)) | {"schema_version": 2}
    for task in data["quality"]["zeroshot"]:
        columns = task["items"]
        task["items"] = [
            {"id": i, "hash": h, "correct": c, "loglikelihoods": [-1.5, -2.0]}
            for i, h, c in zip(columns["ids"], columns["hashes"], columns["correct"], strict=True)
        ]
    return data


def test_items_of_schema_2_become_columns(tmp_path: Path) -> None:
    new = records(Spec())[1]
    path = tmp_path / "quality-1.json"
    path.write_text(json.dumps(_of_schema_2(new)))
    old, light = read(path), lean(path)
    assert isinstance(old, Record) and isinstance(light, Record) and new.quality and old.quality and light.quality
    for ours, theirs, without in zip(new.quality.zeroshot, old.quality.zeroshot, light.quality.zeroshot, strict=True):
        assert len(ours.items) == 200
        assert (
            theirs.items.model_copy(update={"loglikelihoods": []}) == ours.items == without.items.model_copy(update={"loglikelihoods": []})
        )
        assert theirs.items.loglikelihoods == [[-1.5, -2.0]] * 200 and without.items.loglikelihoods == [[-3.5]] * 200
    path.write_bytes(dump(old))
    assert read(path) == old


@pytest.mark.parametrize(("engine", "kept"), [("transformers", 41_000_000), ("compiled", None), ("llamacpp", None)])
def test_activations_of_schema_3_are_forgotten_where_the_cache_was_taken_off_them(engine: str, kept: int | None, tmp_path: Path) -> None:
    path = tmp_path / "speed-1.json"
    new = records(Spec(engine=engine))[2]
    path.write_bytes(dump(new))
    assert new.speed and new.speed.memory and new.speed.memory.activation_bytes == 41_000_000 and read(path) == new
    path.write_text(json.dumps(json.loads(dump(new)) | {"schema_version": 3}))
    for old in (read(path), lean(path)):
        assert isinstance(old, Record) and old.speed and old.speed.memory and old.speed.memory.activation_bytes == kept


@pytest.mark.parametrize(
    ("version", "layer", "activations", "flagged"),
    [(4, "PackedLinear", 60, True), (5, "PackedLinear", 60, False), (4, "PackedLinear", 3, False), (4, "Linear4bit", 60, False)],
)
def test_prompts_of_schema_4_that_copied_the_head_have_a_flag(
    version: int, layer: str, activations: int, flagged: bool, tmp_path: Path
) -> None:
    data = json.loads(dump(records(Spec())[2])) | {"schema_version": version}
    product, head = data["speed"]["evidence"]["layers"][0], {"layer": "Embedding", "role": "embedding", "bytes": 57_000_000}
    data["speed"]["evidence"]["layers"] = [product | head, product | {"layer": layer}]
    data["speed"]["memory"]["activation_bytes"] = activations * 1_000_000
    path = tmp_path / "speed-1.json"
    path.write_text(json.dumps(data))
    for old in (read(path), lean(path)):
        assert isinstance(old, Record) and old.speed
        assert any("a copy of the dense head" in flag for flag in old.speed.flags) is flagged


def test_items_without_a_hash_or_of_unequal_columns_are_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "quality-1.json"
    lame = _of_schema_2(records(Spec())[1])
    del lame["quality"]["zeroshot"][0]["items"][7]["hash"]
    path.write_text(json.dumps(lame))
    assert lean(path) == read(path) == "not a record: 'hash'"
    uneven = records(Spec())[1]
    uneven.quality.zeroshot[0].items.correct.pop()  # type: ignore[union-attr]
    path.write_bytes(dump(uneven))
    assert lean(path) == read(path) and "the columns of the items differ in length" in str(read(path))


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path: Path, record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    path = store.put(record)
    before = path.read_text()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        store.put(record.model_copy(update={"status": Status.FAILED}))
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("label", ["../../etc/passwd", "a/b\\c", ".hidden", "x" * 500, "", "<script>", "a b\0c"])
def test_a_label_never_leaves_its_folder(label: str) -> None:
    name = slug(label)
    assert name
    assert len(name) <= 80
    assert not name.startswith(".")
    assert os.path.basename(name) == name
    assert "\0" not in name


def _hold(root: Path, record: Record, held: object, seconds: float) -> None:
    with Store(root).lock(record.cell, Stage.COMPRESS, record.hardware):
        held.set()  # type: ignore[attr-defined]
        time.sleep(seconds)


def test_a_second_process_is_told_and_may_wait_and_a_killed_one_frees_the_lock(tmp_path: Path, record: Record) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, record, held, 60))
    process.start()
    assert held.wait(30)
    store = Store(tmp_path)
    with store.lock(record.cell, Stage.COMPRESS, record.hardware) as mine, store.lock(record.cell, Stage.QUALITY, record.hardware) as other:
        assert not mine and other
    threading.Timer(0.5, process.kill).start()
    with store.lock(record.cell, Stage.COMPRESS, record.hardware, wait=True) as mine:
        assert mine and not process.is_alive()
    process.join()
    with store.lock(record.cell, Stage.COMPRESS, record.hardware) as mine:
        assert mine


def test_a_stage_that_was_taken_over_meanwhile_writes_no_record(tmp_path: Path, record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    pace = Pace(beat_s=60, gone_s=0.3, look_s=0.02)
    first, second = Store(tmp_path, pace), Store(tmp_path, pace)
    task = (record.cell, Stage.COMPRESS, record.hardware)
    with ExitStack() as stack:
        with monkeypatch.context() as patch:
            patch.setattr(processes, "current", lambda: processes.Process("0123456789ab", 7, 7))
            assert stack.enter_context(first.lock(*task))
        with second.lock(*task, wait=True) as mine:
            assert mine
            with pytest.raises(Superseded):
                first.put(record)
            assert second.get(*task) is None
            second.put(record)
            assert second.holders()[f"compress-{record.key}"].pid == os.getpid()
    assert second.holders() == {} and len(second.scan()[0]) == 1
    first.put(record)


def test_a_record_of_a_newer_version_is_an_error_and_stays(tmp_path: Path, record: Record) -> None:
    store = Store(tmp_path)
    path = store.put(record.model_copy(update={"schema_version": SCHEMA_VERSION + 1}))
    before = path.read_bytes()
    for use in (lambda: store.get(record.cell, Stage.COMPRESS, record.hardware), lambda: store.put(record)):
        with pytest.raises(StoreError, match="newer version of slimbench") as error:
            use()
        assert "\n" not in str(error.value)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("shared", [False, True])
def test_a_server_that_does_not_answer_costs_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    record = records(Spec())[0]
    store = Store(tmp_path)
    path = store.put(record)
    before, read_bytes = path.read_bytes(), Path.read_bytes

    def stale(file: Path) -> bytes:
        if file == path if not shared else file.parent.name == "shared":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read_bytes(file)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", stale)
        patch.setattr(time, "sleep", lambda _: None)
        checked.cache_clear()
        for use in (lambda: store.get(record.cell, Stage.COMPRESS, record.hardware), lambda: store.put(record)):
            with pytest.raises(StoreError, match="Stale file handle"):
                use()
        assert [fault.path for fault in store.scan()[1]] == [path.relative_to(tmp_path).as_posix()]
    assert path.read_bytes() == before and store.get(record.cell, Stage.COMPRESS, record.hardware) == record


def test_what_was_set_aside_is_never_replaced_and_never_counts(tmp_path: Path, record: Record) -> None:
    store = Store(tmp_path)
    path = store.put(record)
    for content in ("first", "second", path.read_text()[:-9]):
        path.write_text(content)
        store.put(record)
    aside = sorted(path.parent.glob("*.unreadable"))
    assert [file.read_text()[:6] for file in aside][:2] == ["second", path.read_text()[:6]] and len(aside) == 3
    (path.parent / f"{path.name}.unreadable").write_bytes(path.read_bytes())
    found, unreadable = store.scan()
    assert found == [record] and len(unreadable) == 3
    assert any("rename it to take it" in fault.reason for fault in unreadable)


def test_hidden_files_are_no_records(tmp_path: Path, record: Record) -> None:
    store = Store(tmp_path)
    path = store.put(record)
    for name in (f".{path.name}", ".locks/x/y.json", ".hydra/a/b.json"):
        file = path.parent / name if "/" not in name else tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(path.read_bytes())
    assert store.scan() == ([record], [])
