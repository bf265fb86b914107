"""What was generated or converted before is held against its hashes, and made again where they differ."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from slimbench.harness.config.schema import ModelConfig
from slimbench.harness.run.proofs.method import TINY
from slimbench.harness.stages import models
from slimbench.tasks import gguf


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMBENCH_CACHE", str(tmp_path / "cache"))


def prepared(model: ModelConfig) -> tuple[Path, list[str]]:
    phases: list[str] = []
    return models.prepare(model, phases.append), phases


def test_random_weights_with_other_bytes_are_generated_again() -> None:
    model = ModelConfig(name="tiny", source="random", dtype="float32", shape=TINY)
    folder, phases = prepared(model)
    assert phases == ["prepare model"]
    good = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    assert prepared(model) == (folder, [])
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4096] + bytes(4096))
    assert prepared(model) == (folder, ["prepare model"])
    assert all((tensor == good[name]).all() for name, tensor in load_file(weights).items())
    (folder / "hashes.json").unlink()
    assert prepared(model) == (folder, ["prepare model"]), "a folder of unknown bytes is not used"


def test_another_version_of_the_converter_is_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig(name="smollm2", source="asset:smollm2-135m", dtype="bfloat16")
    before = models._folder(model)
    monkeypatch.setattr(gguf, "VERSION", gguf.VERSION + 1)
    assert models._folder(model) != before
