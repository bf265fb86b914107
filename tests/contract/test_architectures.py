"""Pruning and recovery on other decoders than Llama: refused in one line before weights are written, or what is claimed is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimbench.methods.base import DenseModel, Unsupported
from tests.contract.shipped import CALIBRATION, classes, make, runnable, sound
from tests.contract.test_methods import differences
from tests.support import architectures, tiny

FAMILY = [name for name, method in classes().items() if method.family in ("pruning", "distillation", "peft")]
OTHERS = ("opt", "mixtral", "olmoe")


@pytest.fixture(scope="module", params=OTHERS)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    folder = tmp_path_factory.mktemp(request.param)
    architectures.make(request.param, torch.bfloat16).save_pretrained(folder)
    return tiny.dense_model(folder)


def test_the_family_is_large() -> None:
    assert len(FAMILY) > 60


@pytest.mark.full
@pytest.mark.parametrize("name", FAMILY)
def test_a_decoder_is_refused_in_one_line_or_compressed_as_claimed(name: str, dense: DenseModel, tmp_path: Path) -> None:
    out = tmp_path / "artefact"
    try:
        made = make(runnable(name), dense, out)
    except Unsupported as error:
        assert str(error) and "\n" not in str(error)
        assert not list(out.rglob("*.safetensors")), "it is refused before anything is written"
        return
    model = made.load()
    assert differences(made, model) == set()
    assert sound(model, CALIBRATION.ids[:2] % 90)
