"""Hashes that are remembered, and folders that are held against theirs."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest

from slimbench.util import checksums
from slimbench.util.files import replace_folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose bytes were read."""
    taken: list[Path] = []
    take = checksums._take
    monkeypatch.setattr(checksums, "_take", lambda path, progress: (taken.append(path), take(path, progress))[1])
    return taken


def settled(file: Path, content: bytes) -> Path:
    """A file that was written a minute ago."""
    file.write_bytes(content)
    then = file.stat().st_mtime - 60
    os.utime(file, (then, then))
    return file


def forget() -> None:
    """As a new process begins."""
    checksums._known.clear()


def test_a_second_look_reads_nothing_in_a_new_process_too(tmp_path: Path, reads: list[Path]) -> None:
    file = settled(tmp_path / "weights", b"abc")
    expected = hashlib.sha256(b"abc").hexdigest()
    assert [checksums.sha256(file) for _ in range(500)] == [expected] * 500
    forget()
    assert checksums.sha256(file) == expected
    assert reads == [file]


def test_a_changed_file_is_read_again_even_with_its_old_size_and_time(tmp_path: Path, reads: list[Path]) -> None:
    file = settled(tmp_path / "weights", b"abc")
    before = file.stat()
    checksums.sha256(file)
    file.write_bytes(b"abd")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert checksums.sha256(file) == hashlib.sha256(b"abd").hexdigest()
    forget()
    assert checksums.sha256(file) == hashlib.sha256(b"abd").hexdigest()
    assert len(reads) == 2


def test_what_was_written_just_now_is_not_remembered(tmp_path: Path, reads: list[Path]) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    checksums.sha256(file)
    checksums.sha256(file)
    assert reads == [file, file]


def test_a_note_of_another_file_is_not_believed(tmp_path: Path) -> None:
    file = settled(tmp_path / "weights", b"abc")
    checksums.sha256(file)
    forget()
    note = checksums._note(file)
    for forged in (json.loads(note.read_text()) | {"path": "/other", "sha256": "0"}, [], {"path": str(file)}):
        note.write_text(json.dumps(forged))
        assert checksums.sha256(file) == hashlib.sha256(b"abc").hexdigest()
        forget()


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no-folder").write_text("")
    monkeypatch.setenv("SLIMBENCH_CACHE", str(tmp_path / "no-folder"))
    assert checksums.sha256(settled(tmp_path / "weights", b"abc")) == hashlib.sha256(b"abc").hexdigest()


def test_a_long_hashing_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(checksums, "_SILENT_S", -1.0)
    checksums.sha256(settled(tmp_path / "weights", b"abc"))
    captured = capsys.readouterr()
    assert f"hashing {tmp_path}: 0.0 of 0.0 GB" in captured.err
    assert not captured.out


def test_a_sealed_folder_names_what_is_wrong_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "sealed"
    assert checksums.seal_fault(folder) == "it has no hashes"
    with checksums.sealed_folder(folder, {"count": 2}) as unfinished:
        (unfinished / "a").write_text("a")
        (unfinished / "sub").mkdir()
        (unfinished / "sub" / "b").write_text("b")
    assert checksums.seal_fault(folder) is None
    assert checksums.facts(folder) == {"count": 2}
    (folder / "sub" / "b").write_text("c")
    assert str(checksums.seal_fault(folder)).startswith("sub/b has other bytes than were written")
    (folder / "sub" / "b").unlink()
    assert checksums.seal_fault(folder) == "sub/b is missing"
    (folder / checksums.SEAL).write_text("[")
    assert checksums.seal_fault(folder) == "it has no hashes"


def test_a_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), checksums.sealed_folder(tmp_path / "sealed") as unfinished:
        (unfinished / "a").write_text("a")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_of_many_that_come_at_once_one_folder_stays_whole(tmp_path: Path) -> None:
    target, errors = tmp_path / "target", []

    def publish(name: str) -> None:
        try:
            for turn in range(60):
                folder = tmp_path / f"{name}-{turn}"
                folder.mkdir()
                (folder / "one").write_text(name)
                (folder / "two").write_text(name)
                replace_folder(folder, target)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=publish, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert (target / "one").read_text() == (target / "two").read_text()
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["target"]
