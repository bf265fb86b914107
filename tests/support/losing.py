"""An engine under which the artefact goes away, once, after it was found to be sound."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, ClassVar

from slimbench.harness.engines.transformers import TransformersEngine
from slimbench.harness.measure.loaded import LoadedModel
from slimbench.util.files import cache_dir

REMOVE, CUT = "remove-once", "cut-once"


class LosingEngine(TransformersEngine):
    """Loads as that of transformers, but for the first time where a file in the cache asks for the loss."""

    version: ClassVar[int] = 1

    def open(self, artefact: Path, loader: Any, device: str, trust_remote_code: bool) -> LoadedModel:
        folder = artefact.resolve()
        if _asked(REMOVE):
            shutil.rmtree(folder)
        if _asked(CUT):
            for path in folder.glob("*.safetensors"):
                path.chmod(0o600)
                os.truncate(path, path.stat().st_size // 2)
        return super().open(artefact, loader, device, trust_remote_code)


def _asked(name: str) -> bool:
    file = cache_dir() / name
    asked = file.exists()
    file.unlink(missing_ok=True)
    return asked
