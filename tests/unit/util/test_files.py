"""Files that appear whole, keep the user's umask, and leave nothing behind."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from slimbench.util import files, processes
from slimbench.util.files import atomic_file, atomic_folder, read_patiently, sweep, write_atomically


@pytest.fixture(params=[0o022, 0o077, 0o002])
def mask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_rights_are_those_that_the_umask_leaves(mask: int, tmp_path: Path) -> None:
    write_atomically(tmp_path / "new" / "file", b"1")
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "below").mkdir(mode=0o700)
        (folder / "below" / "file").touch(mode=0o600)
        (folder / "below" / "tool").touch(mode=0o755)
    assert _mode(tmp_path / "new" / "file") == _mode(tmp_path / "folder" / "below" / "file") == 0o666 & ~mask
    assert _mode(tmp_path / "folder") == _mode(tmp_path / "folder" / "below") == 0o777 & ~mask


def test_a_file_that_others_read_under_another_name_stays_theirs(tmp_path: Path) -> None:
    (tmp_path / "blob").touch()
    (tmp_path / "blob").chmod(0o644)
    (tmp_path / "own").mkdir()
    (tmp_path / "own").chmod(0o700)
    os.link(tmp_path / "blob", tmp_path / "own" / "linked")
    (tmp_path / "own" / "alone").touch()
    files.set_modes(tmp_path / "own", 0o444)
    assert (_mode(tmp_path / "blob"), _mode(tmp_path / "own" / "alone")) == (0o444, 0o400)


def test_a_folder_of_another_file_system_takes_its_place_too(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system")
    with tempfile.TemporaryDirectory(dir=elsewhere) as folder:
        for content in ("first", "second"):
            (made := Path(folder) / "made").mkdir()
            (made / "file").write_text(content)
            files.replace_folder(made, tmp_path / "place")
            assert (tmp_path / "place" / "file").read_text() == content and not made.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_a_shared_group_stays(tmp_path: Path) -> None:
    tmp_path.chmod(0o2775)
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "below").mkdir()
    assert _mode(tmp_path / "folder" / "below") & stat.S_ISGID


def test_a_new_file_is_on_the_disk_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content before the rename, the folder after it."""
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        order.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_atomically(tmp_path / "file", b"1")
    assert order == ["file", "rename", "folder"]


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE])
def test_what_may_pass_is_tried_again(error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"1")
    left, read, waited = [2], Path.read_bytes, []

    def faulty(path: Path) -> bytes:
        if left[0]:
            left[0] -= 1
            raise OSError(error, os.strerror(error))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", faulty)
    monkeypatch.setattr(time, "sleep", waited.append)
    assert read_patiently(tmp_path / "file") == b"1" and len(waited) == 2
    left[0] = 100
    with pytest.raises(OSError, match=os.strerror(error)):
        read_patiently(tmp_path / "file")
    waited.clear()
    monkeypatch.setattr(Path, "read_bytes", read)
    with pytest.raises(FileNotFoundError):
        read_patiently(tmp_path / "none")
    assert not waited, "what is not there is no fault"


def test_a_name_that_nfs_has_not_seen_yet_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"1")
    left, read = [1], Path.read_bytes

    def unseen(path: Path) -> bytes:
        if left[0]:
            left[0] -= 1
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", unseen)
    assert read_patiently(tmp_path / "file") == b"1"


KILLED = """
import os, signal, sys
from pathlib import Path
from slimbench.util.files import atomic_file, atomic_folder, scratch
with atomic_folder(Path(sys.argv[1]) / "folder") as folder, atomic_file(Path(sys.argv[1]) / "file") as file, scratch("test") as own:
    (folder / "half").write_text("half"); file.write_text("half"); (Path(own) / "half").write_text("half")
    print(own, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "mine") as mine, atomic_file(tmp_path / "also mine") as also:
        done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert done.returncode == -signal.SIGKILL and Path(done.stdout.strip()).is_dir()
        elsewhere = processes.Process("0123456789ab", 1, 1).stamp()
        (tmp_path / f".theirs.{elsewhere}.tmp").write_text("of another node")
        (tmp_path / f".long ago.{elsewhere}.tmp").write_text("of another node")
        os.utime(tmp_path / f".long ago.{elsewhere}.tmp", (0, 0))
        (tmp_path / ".own").write_text("hidden")
        os.utime(tmp_path / ".own", (0, 0))
        assert sweep(tmp_path) == len("halfhalf" + "of another node")
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {mine.name, also.name, f".theirs.{elsewhere}.tmp", ".own"}
    places = {name: Path(tempfile.mkdtemp(prefix="slimbench-")) for name in ("old", "new")}
    records = Path(tempfile.mkdtemp(prefix="slimbench-records-"))
    for path in (places["old"], records):
        os.utime(path, (0, 0))
    files._sweep_scratch.cache_clear()
    with files.scratch("test"):
        assert not Path(done.stdout.strip()).exists()
        assert not places["old"].exists() and places["new"].exists() and records.exists()
    places["new"].rmdir()
    records.rmdir()
    assert not list(Path(tempfile.gettempdir()).glob(f"slimbench-test-*-{os.getpid()}-*"))
