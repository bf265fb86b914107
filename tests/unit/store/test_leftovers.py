"""What ended processes left behind goes with the next run, and what a live one uses stays."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from slimbench.harness.schema.identity import Stage
from slimbench.harness.store import artefact, check, leftovers
from slimbench.harness.store.store import Store
from slimbench.util import locks, processes
from slimbench.util.files import beside
from slimbench.util.processes import Process
from tests.support.board_records import compress_record
from tests.unit.store.test_artefact import _publish

LONG_AGO = (0, 0)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLIMBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def dead() -> Process:
    child = subprocess.Popen(["true"])
    child.wait()
    return Process(processes.current().space, child.pid, 1)


def _owned(path: Path, process: Process) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"token": "a" * 32, "space": process.space, "pid": process.pid, "start": process.start}))
    return path


def _left(fresh: Path, results: Path, process: Process) -> list[Path]:
    """What a process leaves in all places when it is killed."""
    stamp, found = process.stamp(), []
    for folder in (fresh / "artefacts", fresh / "models", fresh / "reference"):
        found.append(folder / f".thing.{stamp}")
        (found[-1] / "below").mkdir(parents=True)
        (found[-1] / "below" / "file").write_text("1")
    for place in ("a/b/.x.json", "shared/.x.json", "plans/.x.json", ".slimbench", ".locks/"):
        found.append(results / f"{place}.{stamp}.tmp")
        found[-1].parent.mkdir(parents=True, exist_ok=True)
        found[-1].write_text("1")
    return [*found, _owned(results / ".locks" / "speed-1-2.owner", process), _owned(fresh / "models" / f"{process.pid}.owner", process)]


def test_the_next_run_removes_all_that_killed_processes_left_and_nothing_of_others(fresh: Path, tmp_path: Path, dead: Process) -> None:
    results, record = tmp_path / "results", compress_record()
    store = Store(results)
    path = store.put(record)
    _publish("whole")
    old = _publish("again")
    _publish("again", 1.0)
    gone = _left(fresh, results, dead)
    live = _left(fresh, results / "..", processes.current())[:3]
    theirs = _owned(results / ".locks" / "quality-1-2.owner", Process("0123456789ab", 1, 1))
    (fresh / "checkpoints" / "whole-0").mkdir(parents=True)
    (fresh / "checkpoints" / "half-0").mkdir()
    os.utime(old, LONG_AGO)
    for file in old.rglob("*"):
        os.utime(file, LONG_AGO)
    (fresh / "artefacts" / "none").symlink_to("../objects/none")
    assert len(check.remarks(store)) == len(gone) + 3
    with store.lock(record.cell, Stage.COMPRESS, record.hardware) as mine:
        assert mine
    assert not [path for path in gone if path.exists()]
    assert all(path.exists() for path in (*live, theirs, path, fresh / "checkpoints" / "half-0"))
    assert not (fresh / "checkpoints" / "whole-0").exists() and not old.exists()
    assert artefact.exists("whole") and artefact.exists("again")
    assert sorted(path.name for path in (fresh / "artefacts").glob("[!.]*")) == ["again", "whole"]
    assert check.remarks(store) == []


def test_checkpoints_of_what_is_made_again_stay(fresh: Path) -> None:
    _publish("key")
    (fresh / "checkpoints" / "key-0").mkdir(parents=True)
    with artefact.staging("key"):
        leftovers.sweep(fresh / "results")
        assert (fresh / "checkpoints" / "key-0").exists()
    leftovers.sweep(fresh / "results")
    assert not (fresh / "checkpoints" / "key-0").exists()


def test_what_older_versions_left_goes_when_it_rests_for_a_day(fresh: Path) -> None:
    places = [
        "results/.locks/speed-1-2.lock",
        "models/tiny.lock",
        "artefacts/.key.host.123/file",
        "documents/a-1.4711",
        "tokens/abc.4711.npy",
        "reference/.key.abc/logp.npy",
    ]
    for place in places:
        (fresh / place).parent.mkdir(parents=True, exist_ok=True)
        (fresh / place).write_text("1")
    leftovers.sweep(fresh / "results")
    assert all((fresh / place).exists() for place in places)
    for path in fresh.rglob("*"):
        os.utime(path, LONG_AGO)
    leftovers.sweep(fresh / "results")
    assert not any((fresh / place).exists() for place in places)


def test_a_lock_of_a_node_that_vanished_goes_after_a_day(tmp_path: Path) -> None:
    place = _owned(tmp_path / "speed-1-2.owner", Process("0123456789ab", 1, 1))
    taken = _owned(tmp_path / f"speed-1-2.{'f' * 32}.taken", Process("0123456789ab", 1, 1))
    locks.sweep(tmp_path)
    assert place.exists() and taken.exists()
    for path in (place, taken):
        os.utime(path, (time.time() - 2 * 86400,) * 2)
    locks.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_record_is_told(fresh: Path, tmp_path: Path) -> None:
    record = compress_record()
    Store(tmp_path / "ours").put(record)
    Store(tmp_path / "ours").receive(record.model_copy(update={"origin": "0" * 16}))
    (remark,) = check.remarks(Store(tmp_path / "ours"))
    assert "of another results folder" in remark.what


def test_staging_is_named_by_its_process(fresh: Path) -> None:
    with artefact.staging("key") as folder:
        assert processes.of_name(folder.name) == processes.current() and artefact.is_staged("key")
        assert beside(artefact.location("key")) != folder
    assert not artefact.is_staged("key")
