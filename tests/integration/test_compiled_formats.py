"""The compiled engine on formats whose layers are not plain products; each compiles for seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimbench.harness.engines.compiled import CompiledModel
from slimbench.harness.engines.transformers import TransformersModel
from slimbench.methods.base import DenseModel
from slimbench.methods.core.layers import block_linears
from slimbench.methods.formats import codebook, runtime
from slimbench.methods.formats.runtime import ActivationGrid, InputPlan
from tests.support import tiny
from tests.unit.methods.formats.test_codebook import write


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"))


def test_codebooks_give_the_numbers_of_the_eager_engine(dense: DenseModel, tmp_path: Path) -> None:
    write(dense, tmp_path)
    ids = tiny.tokens(1, 16).ids
    eager = TransformersModel(codebook.load(tmp_path), "cpu").logits(ids).float()
    compiled = CompiledModel(codebook.load(tmp_path), "cpu").logits(ids).float()
    assert (eager - compiled).abs().max() < 0.05 * eager.abs().max()


def test_rounded_inputs_give_the_numbers_of_the_eager_engine(dense: DenseModel, tmp_path: Path) -> None:
    model = dense.load(dtype=torch.float32)
    plans = {
        name: InputPlan(hadamard=32, grid=ActivationGrid("e2m1", 4, "group", 32, scale_format="e8m0"))
        if "down" in name
        else InputPlan(grid=ActivationGrid("int", 4, symmetric=False))
        for name in block_linears(model)
    }
    runtime.save(model, tmp_path, plans)
    ids = tiny.tokens(2, 16).ids
    eager = TransformersModel(runtime.load(tmp_path), "cpu").logits(ids)
    compiled = CompiledModel(runtime.load(tmp_path), "cpu").logits(ids)
    assert (eager - compiled).abs().mean() < 0.02 * eager.abs().mean()
