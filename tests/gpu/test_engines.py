"""Engines that need a card. Run by hand: `pytest -n 0 tests/gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimbench.harness.engines import semi_structured
from slimbench.harness.engines.transformers import TransformersModel, load_pretrained
from slimbench.methods.pruning.unstructured.magnitude import Magnitude
from tests.support.tiny import save_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")]


def test_semi_structured_products_are_those_of_the_dense_weights(tmp_path: Path) -> None:
    source = save_model(tmp_path / "dense", hidden_size=256, intermediate_size=512)
    pruned = tmp_path / "pruned"
    pruned.mkdir()
    Magnitude(pattern="2:4").compress(source, None, pruned)
    dense, sparse = (TransformersModel(load(pruned, "cuda"), "cuda") for load in (load_pretrained, semi_structured.load_pretrained))
    ids = torch.randint(0, 256, (2, 32))
    assert torch.allclose(sparse.logits(ids).float(), dense.logits(ids).float(), atol=0.05)
    found = sparse.evidence()
    assert found.kernel and "sparse" in found.kernel and found.effective_bits and found.effective_bits < 10
    assert {layer.pattern for layer in found.layers if layer.role == "linear"} == {"2:4"}
