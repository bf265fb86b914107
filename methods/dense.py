"""The uncompressed model: the reference of every comparison."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from methods._common import save_dense
from methods.base import HUGGINGFACE, Calibration, Citation, Claim, DenseModel, Method


@dataclass(frozen=True)
class Dense(Method):
    """The source as it is; only a source stored in another dtype is converted to the model's."""

    family: ClassVar[str] = "dense"
    citation: ClassVar[Citation] = Citation("Uncompressed model", year=2017)
    reference: ClassVar[str] = "transformers:AutoModelForCausalLM"

    def compress(self, dense: DenseModel, calibration: Calibration | None, out: Path) -> Claim:
        """Link the files of the source, or copy them across file systems: the artefact is the same bytes."""
        config = json.loads((dense.path / "config.json").read_text())
        files = [dense.path / "config.json", *dense.path.glob("*.safetensors"), *dense.path.glob("*.safetensors.index.json")]
        if config.get("dtype", config.get("torch_dtype")) != dense.dtype or len(files) == 1:
            save_dense(dense.load(), out)
        else:
            for file in files:
                _link(file.resolve(), out / file.name)
        return Claim(format=HUGGINGFACE)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
