"""The dense source of a method, laid into an artefact without a copy of its weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from methods._common import save_dense
from methods.base import DenseModel


def link_source(dense: DenseModel, out: Path) -> None:
    """Link config and weights, or copy them across file systems; only a source stored in another dtype is converted to the model's."""
    config = json.loads((dense.path / "config.json").read_text())
    files = [dense.path / "config.json", *dense.path.glob("*.safetensors"), *dense.path.glob("*.safetensors.index.json")]
    if config.get("dtype", config.get("torch_dtype")) != dense.dtype or len(files) == 1:
        save_dense(dense.load(), out)
    else:
        for file in files:
            _link(file.resolve(), out / file.name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
