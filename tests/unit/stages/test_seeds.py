"""The seed of a cell: another one gives another artefact of each method that draws, and the same one the same."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slimbench.harness.config.compose import resolve
from slimbench.harness.config.parse import build_method
from slimbench.harness.stages import compress
from slimbench.harness.store import artefact
from slimbench.methods.base import DenseModel
from tests.support import tiny
from tests.unit.measure.test_lies import Silent
from tests.unit.methods.test_methods import shipped_step

CALIBRATION = tiny.tokens(samples=8, length=32)
DRAWS: dict[str, dict[str, Any]] = {
    "quip-2bit": {},
    "quarot-rtn-w4a4": {},
    "vptq": {"index_bits": 6},
    "spinquant-rtn-w4a4": {"steps": 2},
    "llm-qat": {"steps": 2, "sequences": 4, "generation_batch": 4, "length": 16},
    "peqa": {"steps": 2},
    "loftq": {"steps": 2},
    "qlora": {"steps": 2},
    "qa-lora": {"steps": 2},
    "omniquant": {"steps": 3},
    "adaround": {"steps": 3},
    "rptq-w4a4": {},
    "mixed-precision": {},
    "signround": {"iterations": 20, "batch_size": 2},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"), hidden_size=128, intermediate_size=256)


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def made(name: str, settings: dict[str, Any], dense: DenseModel, out: Path) -> dict[str, bytes]:
    method = build_method(shipped_step(name, **settings))
    if method.needs.missing_modules():
        pytest.skip(f"{name} needs {', '.join(method.needs.missing_modules())}")
    out.mkdir()
    method.compress(dense, CALIBRATION, out)
    return weights(out)


@pytest.mark.parametrize("name", DRAWS)
def test_a_method_that_draws_depends_on_the_seed_of_the_cell(name: str, dense: DenseModel, tmp_path: Path) -> None:
    first, again, other = (made(name, DRAWS[name], replace(dense, seed=seed), tmp_path / f"{run}") for run, seed in enumerate((0, 0, 1)))
    assert first == again
    assert first != other


@pytest.mark.parametrize("name", ["gptaq", "hqq", "kmeans-4bit"])
def test_a_method_that_draws_nothing_has_no_spread(name: str, dense: DenseModel, tmp_path: Path) -> None:
    assert made(name, {}, dense, tmp_path / "first") == made(name, {}, replace(dense, seed=1), tmp_path / "second")


def test_the_seed_of_a_cell_reaches_its_methods(overrides: list[str]) -> None:
    folders = []
    for seed in (0, 0, 1):
        key = uuid.uuid4().hex
        compress.run(resolve([*overrides, "method=quarot-rtn-w4a4", f"seed={seed}"]), key, Silent())
        folders.append(artefact.location(key))
    first, again, other = map(weights, folders)
    assert first == again
    assert first != other
