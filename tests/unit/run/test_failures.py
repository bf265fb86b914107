"""A permission that is refused: the machine's fault in slimbench's own folders, a method's anywhere else."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from slimbench.harness.run.process.failures import reason
from slimbench.harness.schema.identity import Reason
from slimbench.util import files
from slimbench.util.files import cache_dir


def refused(path: str) -> PermissionError:
    return PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


def test_a_refusal_is_the_disks_where_the_folder_is_slimbenchs_own() -> None:
    assert reason(refused(str(cache_dir() / "tokens" / "x" / "tokens.npy"))) is Reason.DISK
    assert reason(refused(str(Path(tempfile.gettempdir()) / "slimbench-x"))) is Reason.DISK
    assert reason(refused("/etc/passwd")) is None and reason(refused("models/own")) is None


@pytest.mark.parametrize(("raised_in", "expected"), [(files.__file__, Reason.DISK), (__file__, None)])
def test_a_refusal_without_a_path_is_the_disks_where_slimbench_was_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised_in: str, expected: Reason | None
) -> None:
    names: dict[str, Any] = {}
    exec(compile("def refuse(*_):\n    raise PermissionError(13, 'Permission denied')", raised_in, "exec"), names)
    with monkeypatch.context() as patch, pytest.raises(PermissionError) as refusal:
        patch.setattr(os, "fsync", names["refuse"])
        files.write_atomically(tmp_path / "file", b"")
    assert reason(refusal.value) is expected
