"""An artefact is loaded only while its files are those that were published."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from slimbench.harness.config.compose import resolve
from slimbench.harness.stages import common
from slimbench.harness.store import artefact, scratch
from slimbench.harness.store.artefact import Manifest
from slimbench.methods.base import Claim
from slimbench.methods.formats import huggingface
from tests.unit.measure.test_lies import Silent

CONTENT = {"model.safetensors": b"weights" * 100, "config.json": b"{}", "parts/more.bin": b"1"}


@pytest.fixture
def key() -> str:
    """The key of an artefact that was published."""
    key = uuid4().hex[:16]
    _publish(key)
    return key


def _publish(key: str, seconds: float = 0.0) -> Path:
    with artefact.staging(key) as folder:
        out = folder / "step-0"
        for name, content in CONTENT.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(content)
        return artefact.publish(out, Manifest(key=key, model="tiny", pipeline=[], claim=Claim("huggingface"), step_seconds={"a": seconds}))


def test_what_was_published_is_opened(key: str) -> None:
    assert artefact.fault(key) is None and artefact.opened(key) == artefact.location(key).resolve()
    assert {file.name for file in artefact.read_manifest(artefact.location(key)).files} == set(CONTENT)


def _write(file: Path, content: bytes) -> None:
    """Files of artefacts are read-only."""
    file.unlink()
    file.write_bytes(content)


def _rekeyed(folder: Path) -> None:
    artefact.write_manifest(folder, artefact.read_manifest(folder).model_copy(update={"key": "other"}))


def _without_hashes(folder: Path) -> None:
    """As versions wrote it that took no hashes."""
    artefact.write_manifest(folder, artefact.read_manifest(folder).model_copy(update={"files": []}))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bytes": (lambda folder: _write(folder / "model.safetensors", b"Weights" * 100), "model.safetensors has other bytes"),
    "length": (lambda folder: _write(folder / "parts" / "more.bin", b""), "parts/more.bin has other bytes"),
    "gone": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "more": (lambda folder: (folder / "adapter.safetensors").write_bytes(b"1"), "adapter.safetensors does not belong to it"),
    "no hashes": (_without_hashes, "it has no hashes"),
    "another's": (lambda folder: _rekeyed(folder), "it is that of another key, other"),
    "no manifest": (lambda folder: (folder / artefact.MANIFEST).unlink(), "it is not in the cache"),
    "half a manifest": (lambda folder: _write(folder / artefact.MANIFEST, b'{"key":'), "its manifest cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_anything_else_is_not_loaded(key: str, overrides: list[str], damage: str) -> None:
    spoil, reason = DAMAGES[damage]
    spoil(artefact.location(key))
    assert str(artefact.fault(key)).startswith(reason)
    with pytest.raises(artefact.Damaged, match="the artefact is not to be used: ") as error:
        common.load(resolve(overrides), key, Silent())
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_where_an_artefact_differs_from_its_record_is_told(key: str) -> None:
    files = artefact.read_manifest(artefact.location(key)).files
    assert artefact.unlike(key, files) is None and artefact.unlike(key, [*reversed(files)]) is None
    other = [file.model_copy(update={"sha256": "f" * 64} if file.name == "config.json" else {}) for file in files]
    assert artefact.unlike(key, other) == "config.json is 44136fa3, and ffffffff in the record"
    assert artefact.unlike(key, files[1:]) == f"{files[0].name} is {str(files[0].sha256)[:8]}, and missing in the record"
    assert artefact.unlike(key, [file.model_copy(update={"sha256": None}) for file in files]) is None, "before there were hashes"


def _publish_many(key: str, cache: Path, turns: int, number: int) -> None:
    os.environ["SLIMBENCH_CACHE"] = str(cache)
    for turn in range(turns):
        _publish(key, number + turn / turns)


def test_publishers_of_one_key_never_fail_and_never_show_a_moment_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMBENCH_CACHE", str(tmp_path))
    _publish("key")
    first = artefact.opened("key")
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_publish_many, args=("key", tmp_path, 25, number)) for number in range(3)]
    for writer in writers:
        writer.start()
    looks = 0
    while any(writer.is_alive() for writer in writers):
        folder = artefact.object_of("key")
        assert artefact.exists("key") and artefact.damage(folder) is None
        looks += 1
    assert [writer.exitcode for writer in writers] == [0, 0, 0] and looks > 20
    assert artefact.damage(first) is None, "who has opened it reads it to the end"
    assert sorted(path.name for path in tmp_path.glob("artefacts/*")) == ["key"]


def test_what_is_published_again_takes_no_room_twice(key: str) -> None:
    first, second = artefact.object_of(key), _publish(key, 1.0)
    assert first != second and {path.name for path in first.rglob("*")} == {path.name for path in second.rglob("*")}
    assert all((first / name).samefile(second / name) for name in CONTENT)
    assert artefact.damage(first) is artefact.fault(key) is None
    _write(second / "config.json", b"{ }")
    third = _publish(key, 2.0)
    assert artefact.fault(key) is None and not (third / "config.json").samefile(second / "config.json")


def test_files_are_read_only_and_a_user_s_own_model_is_not_a_second_name_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMBENCH_CACHE", str(tmp_path / "cache"))
    folder = _publish("key")
    assert {stat.S_IMODE(path.stat().st_mode) & 0o222 for path in folder.rglob("*") if path.is_file()} == {0}
    mine, cached = tmp_path / "mine.safetensors", tmp_path / "cache" / "models" / "cached.safetensors"
    cached.parent.mkdir()
    for source in (mine, cached):
        source.write_bytes(b"1")
        huggingface._link(source, tmp_path / f"linked {source.name}")
    assert (mine.stat().st_nlink, cached.stat().st_nlink) == (1, 2)


def test_an_artefact_of_an_older_version_is_read_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMBENCH_CACHE", str(tmp_path))
    made = _publish("key")
    artefact.location("key").unlink()
    made.rename(artefact.location("key"))
    assert artefact.fault("key") is None and artefact.opened("key") == artefact.location("key") and artefact.unnamed() == []
    _publish("key", 1.0)
    assert artefact.location("key").is_symlink() and artefact.fault("key") is None
    _publish("key", 2.0)
    assert len(artefact.unnamed()) == 1
    artefact.discard("key")
    assert not artefact.exists("key") and len(list(artefact.objects().iterdir())) == 1


def test_scratch_is_a_verified_copy_that_is_read_instead(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(scratch.VARIABLE, str(tmp_path))
    copies: list[Path] = []
    copyfile = shutil.copyfile
    monkeypatch.setattr(shutil, "copyfile", lambda source, target: (copies.append(Path(source)), copyfile(source, target)))
    with ThreadPoolExecutor(4) as pool:
        opened = set(pool.map(lambda _: artefact.opened(key), range(4)))
    (folder,) = opened
    assert folder.is_relative_to(tmp_path) and len(copies) == len(CONTENT), "copied once"
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {*CONTENT, artefact.MANIFEST}
    assert artefact.damage(folder) is None
    _write(folder / "config.json", b"{ }")
    assert artefact.opened(key) == folder and (folder / "config.json").read_bytes() == b"{}"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 95, 5))  # type: ignore[attr-defined]
    _write(folder / "config.json", b"{ }")
    assert artefact.opened(key) == artefact.object_of(key), "no room: the shared folder is read"


def test_scratch_makes_room_of_what_was_not_used_for_a_day(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(scratch.VARIABLE, str(tmp_path))
    root = tmp_path / "slimbench"
    for name, age in (("aa", 3e5), ("bb", 2e5), ("cc", 1e3)):
        (root / name).mkdir(parents=True)
        os.utime(root / name, (time.time() - age,) * 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10000, 0, 5000 * (not (root / "aa").exists())))  # type: ignore[attr-defined]
    assert artefact.opened(key).parent == root
    assert not (root / "aa").exists() and (root / "bb").exists() and (root / "cc").exists()
