"""The identity of a model folder is all that is read of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from slimbench.harness.config import local_model
from slimbench.harness.config.compose import jobs
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.run.cell import make_cell
from slimbench.util import checksums

READ = ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "merges.txt", "modeling_own.py", "chat.jinja"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder whose weights are three megabytes, longer than any head and tail."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in READ:
        (folder / name).write_bytes(b"{}" if name.endswith("json") else b"x")
    (folder / "model.safetensors").write_bytes(bytes(3 << 20))
    return folder


@pytest.mark.parametrize("name", READ)
def test_each_file_counts(folder: Path, name: str) -> None:
    before = local_model.identity(folder)
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    changed = local_model.identity(folder)
    (folder / name).unlink()
    if name in ("config.json", "model.safetensors"):
        with pytest.raises(ConfigError, match=r"no config\.json|no safetensors"):
            local_model.identity(folder)
        assert before != changed
    else:
        assert len({before, changed, local_model.identity(folder)}) == 3


def test_bytes_in_the_middle_count(folder: Path) -> None:
    before = local_model.identity(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(3 << 19)
        file.write(b"\1")
    assert local_model.identity(folder) != before


def test_what_is_never_loaded_does_not_count(folder: Path) -> None:
    before = local_model.identity(folder)
    for name in ("README.md", "pytorch_model.bin", ".gitattributes"):
        (folder / name).write_text("x")
    (folder / "checkpoint-1").mkdir()
    assert local_model.identity(folder) == before


def test_a_plan_of_many_cells_reads_the_folder_once(
    tiny: Path, tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    for file in folder.iterdir():
        os.utime(file, (1e9, 1e9))
    read, take = [], checksums._take
    monkeypatch.setattr(checksums, "_take", lambda path, progress: (read.append(path.name), take(path, progress))[1])
    own = [*overrides, f"model.source=file:{folder}", "method=rtn-4bit,rtn-8bit,nf4"]
    cells = [make_cell(config, tuple(job)) for job, config in jobs(own)]
    assert len({cell.identity.keys.compress for cell in cells}) == 3
    assert sorted(read) == sorted(file.name for file in folder.iterdir())
