"""What an interrupted run resumes from: named tensors and facts, on disk as safetensors and JSON.

The tensors go into a file named by their hash, then `NAME.json`, which names that file, is replaced in one step: whenever the process
dies, the older state or the newer one is whole. A state that is damaged, or that another run wrote, counts as none.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_EVERY_S = 20.0
_WORK_PER_SAVING = 5


class Due:
    """When the next state is to be saved: after 20 seconds of work, or more where saving one took more than a few."""

    def __init__(self) -> None:
        self._at = time.monotonic() + _EVERY_S

    def __bool__(self) -> bool:
        return time.monotonic() >= self._at

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around the saving of a state."""
        began = time.monotonic()
        yield
        now = time.monotonic()
        self._at = now + max(_EVERY_S, _WORK_PER_SAVING * (now - began))


def save(folder: Path, name: str, identity: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Replace the state `name`.

    Args:
        folder: Made if it is not there.
        identity: Whatever tells this run from others; `load` wants the same.
        tensors: Copied to the CPU.
        facts: JSON values.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".{name}.tmp"
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, scratch)
    digest = _sync_and_hash(scratch)
    target = folder / f"{name}-{digest[:16]}.safetensors"
    os.replace(scratch, target)
    scratch.write_text(json.dumps({"identity": identity, "tensors": target.name, "sha256": digest, "facts": facts}))
    _sync_and_hash(scratch)
    os.replace(scratch, folder / f"{name}.json")
    for old in folder.glob(f"{name}-*.safetensors"):
        if old != target:
            old.unlink()


def load(folder: Path, name: str, identity: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors, on the CPU, and facts of the state `name`; None where there is no whole one of this identity."""
    from safetensors import SafetensorError
    from safetensors.torch import load as parse

    try:
        described = json.loads((folder / f"{name}.json").read_text())
        if described["identity"] != identity:
            return None
        stored = (folder / Path(described["tensors"]).name).read_bytes()
        if hashlib.sha256(stored).hexdigest() != described["sha256"]:
            return None
        return parse(stored), described["facts"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def _sync_and_hash(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
