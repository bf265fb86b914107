"""The seed of a cell: another one gives another artefact of each method that draws, and the same one the same."""

from __future__ import annotations

import uuid
from pathlib import Path

from slimbench.harness.config.compose import resolve
from slimbench.harness.stages import compress
from slimbench.harness.store import artefact
from tests.unit.measure.test_lies import Silent


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_the_seed_of_a_cell_reaches_its_methods(overrides: list[str]) -> None:
    folders = []
    for seed in (0, 0, 1):
        key = uuid.uuid4().hex
        compress.run(resolve([*overrides, "method=quarot-rtn-w4a4", f"seed={seed}"]), key, Silent())
        folders.append(artefact.location(key))
    first, again, other = map(weights, folders)
    assert first == again
    assert first != other
