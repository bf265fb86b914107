"""Prompts that went through a model once, for all policies that decide only afterwards what of them stays.

What such a prompt leaves (`methods.formats.attention.operators.reading`) depends on the model, its dtype and the engine, and not on the
rule or the budget of the policy. It is kept in the cache, up to a number of bytes: the readings of other models go first, those that were
used last at the end, and what then finds no room is read anew the next time.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from slimbench.harness.measure.loaded import Branches, Step
from slimbench.util import checksums, files, locks
from slimbench.util.files import cache_dir
from slimbench.util.hashing import digest

ROOM = "readings"
_FILE, _TOKEN = "reading.safetensors", "token"
_MOST = 4 << 30


class Readings:
    """Those of one model on one engine.

    Args:
        key: All that they depend on, beside the tokens.
        most: Bytes of all readings in the cache.
    """

    def __init__(self, key: str, most: int = _MOST) -> None:
        self.folder, self.most = cache_dir() / ROOM / key, most

    def prefill(self, model: Branches, ids: torch.Tensor, room: int) -> tuple[Step, bool]:
        """`Branches.prefill` of one prompt [1, T], and whether an earlier pass over it was used."""
        if not model.decides_after:
            return model.prefill(ids, room), False
        place = self.folder / digest(ids.tolist())
        if (found := self._found(place, model.device)) is not None:
            return Step(found.pop(_TOKEN), model.decide(found, ids.shape[1])), True
        step, reading = model.read(ids)
        with suppress(OSError):  # a full disk costs the next one a pass
            self._keep(place, reading | {_TOKEN: step.token})
        return step, False

    def _found(self, place: Path, device: torch.device) -> dict[str, torch.Tensor] | None:
        with suppress(OSError, SafetensorError):  # another process may have made room
            if place.is_dir() and checksums.seal_fault(place) is None:
                tensors = load_file(place / _FILE, str(device))
                os.utime(self.folder)
                return tensors
        return None

    def _keep(self, place: Path, tensors: dict[str, torch.Tensor]) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        with locks.held(self.folder.parent / "all"):
            every = sorted(self.folder.parent.glob("[!.]*/"), key=lambda folder: folder.stat().st_mtime)
            others, held = [folder for folder in every if folder != self.folder], sum(map(files.size_of, every))
            while others and held + size > self.most:
                held -= files.size_of(others[0])
                files.remove(others.pop(0))
            if held + size <= self.most:
                with checksums.sealed_folder(place) as unfinished:
                    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, unfinished / _FILE)
