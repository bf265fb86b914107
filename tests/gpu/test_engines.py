"""Engines that need a card. Run by hand: `pytest -n 0 tests/gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from slimbench.harness.engines import semi_structured
from slimbench.harness.engines.transformers import TransformersEngine, TransformersModel, load_pretrained
from slimbench.harness.measure.memory import peak_of
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


@pytest.mark.parametrize(
    ("setting", "kernel"), [("flash", "_scaled_dot_product_flash_attention"), ("math", "_scaled_dot_product_attention_math")]
)
def test_attention_is_by_the_kernel_of_the_setting(tmp_path: Path, setting: str, kernel: str) -> None:
    folder, ids = save_model(tmp_path).path, torch.randint(0, 256, (1, 48))
    model = TransformersEngine({}, attention=setting).open(folder, load_pretrained, "cuda:0", False)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        found = model.logits(ids)
    fused = {event.key for event in seen.key_averages() if event.key.startswith("aten::_scaled_dot_product")}
    assert f"aten::{kernel}" in fused and all(kernel in name for name in fused)
    assert torch.allclose(found.float(), TransformersModel(load_pretrained(folder, "cuda:0"), "cuda:0").logits(ids).float(), atol=0.05)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
def test_a_model_over_two_cards_computes_what_one_card_does(tmp_path: Path) -> None:
    folder = save_model(tmp_path, num_hidden_layers=4).path
    two = TransformersEngine({}, cards=2).open(folder, load_pretrained, "cuda:0", False)
    one, ids = TransformersModel(load_pretrained(folder, "cuda:0"), "cuda:0"), torch.randint(0, 256, (2, 32))
    assert two.devices == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert torch.allclose(two.logits(ids).float(), one.logits(ids).float(), atol=1e-3)
    assert two.generate(ids, 8) == one.generate(ids, 8)
    assert two.evidence().weight_bytes == one.evidence().weight_bytes
    peak = peak_of(two.devices, lambda: two.logits(ids))
    assert peak.highest and peak.before and peak.highest > peak.before > (one.evidence().weight_bytes or 0)
