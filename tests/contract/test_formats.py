"""What every artefact format promises: what was written is what is loaded, and a file that is newer, cut short or another's is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimbench.harness.store import artefact
from slimbench.methods.base import DenseModel
from tests.contract.shipped import CALIBRATION, Made, classes, make, runnable

WRITERS: dict[str, str] = {}
for _name, _method in classes().items():
    WRITERS.setdefault(_method.produces, _name)
TENSORS = ("model.safetensors", "adapters.safetensors")


@pytest.fixture(scope="module", params=sorted(WRITERS))
def made(request: pytest.FixtureRequest, dense: DenseModel, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An artefact of each format."""
    return make(runnable(WRITERS[request.param]), dense, tmp_path_factory.mktemp(request.param) / "artefact")


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Made:
    """Another copy, to be spoilt."""
    folder = shutil.copytree(made.folder, tmp_path / "copy")
    return Made(made.method, folder, made.claim)


def test_the_manifest_tells_the_claim_and_the_files(made: Made) -> None:
    assert artefact.read_manifest(made.folder).claim == made.claim
    files = {file.name for file in artefact.files(made.folder)}
    assert files == {path.relative_to(made.folder).as_posix() for path in made.folder.rglob("*") if path.is_file()} - {artefact.MANIFEST}
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl", ".py")) and name != "openvino_model.bin"]


def test_a_copy_is_as_good_as_the_first(made: Made, copy: Made) -> None:
    logits = made.load().logits(CALIBRATION.ids[:2])
    shutil.move(copy.folder, copy.folder.with_name("elsewhere"))
    elsewhere = Made(copy.method, copy.folder.with_name("elsewhere"), copy.claim)
    assert torch.equal(elsewhere.load().logits(CALIBRATION.ids[:2]), logits)


def test_a_newer_schema_is_refused_in_one_line(copy: Made) -> None:
    described = [path for path in copy.folder.glob("*.json") if path.name != artefact.MANIFEST and "schema" in json.loads(path.read_text())]
    if not described:
        pytest.skip(f"{copy.method.produces} is a format of a library")
    (path,) = described
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 999}))
    with pytest.raises(ValueError, match=r"schema 999 is newer than \d+; update slimbench") as refusal:
        copy.load()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("spoil", ["half a file", "a tensor gone", "another model's tensors"])
def test_tensors_that_do_not_fit_are_refused(spoil: str, copy: Made) -> None:
    file = next((copy.folder / name for name in TENSORS if (copy.folder / name).is_file()), None)
    if file is None:
        pytest.skip(f"{copy.method.produces} is a format of a library")
    if spoil == "half a file":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        tensors = load_file(file)
        name = max(tensors, key=lambda key: ("layers.1" in key, tensors[key].numel()))
        if spoil == "a tensor gone":
            del tensors[name]
        else:
            tensors[name] = torch.cat([tensors[name]] * 2, dim=tensors[name].shape.index(max(tensors[name].shape)))
        save_file(tensors, file, {"format": "pt"})
    with pytest.raises(Exception) as refusal:
        copy.load().logits(CALIBRATION.ids[:2])
    assert not isinstance(refusal.value, AssertionError)
