"""The `run` blocks of README and docs, executed as a reader would, on a tiny model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documents import FILES, blocks
from tests.support.paths import ROOT

CELLS = ("run", "sweep")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reader stands: a copy of the records of reference lies there, as in a clone."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "results", folder / "results")
    return folder


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_run_blocks_run(file: Path, folder: Path, overrides: list[str]) -> None:
    """The blocks of one file, in order, in one folder; every command must end well."""
    for block in (block for block in blocks("run") if block.file == file):
        for words in block.commands():
            assert words[0] == "slimbench", f"{block.name}: {words}"
            done = subprocess.run(
                [sys.executable, "-P", "-m", *words, *_tiny(words, overrides)],
                cwd=folder,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0, f"{block.name}: {' '.join(words)}: {done.stderr[-2000:]}"


def _tiny(words: list[str], overrides: list[str]) -> list[str]:
    """What makes a command that names a cell run on the tiny model."""
    if words[1] == "recommend" and "runs" in words:
        return ["--model", "tiny"]
    return overrides if words[1] in (*CELLS, "artefact") else []
