"""Experts that lie in one tensor, as transformers keeps them: who finds them, and who says that they are out of reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slimbench.harness.config.parse import build_method
from slimbench.harness.measure.claims import flags
from slimbench.harness.measure.evidence import collect
from slimbench.harness.schema.evidence import Evidence
from slimbench.methods.base import Claim, DenseModel, Method
from tests.support import tiny
from tests.unit.methods.test_methods import shipped_step

CALIBRATION = tiny.tokens(samples=4, length=32)
PRUNED_BY_LIBRARY = ("wanda", "wanda-2of4", "sparsegpt", "sparsegpt-2of4")
KEEPS_WEIGHTS = ("dense", "shortgpt")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    from transformers import OlmoeConfig

    experts = {"hidden_size": 128, "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0, "tie_word_embeddings": False}
    return tiny.save(OlmoeConfig(**(tiny.SHAPE | experts)), tmp_path_factory.mktemp("olmoe"))


def evidence(dense: DenseModel) -> tuple[Any, Evidence]:
    model: Any = dense.load()
    with torch.inference_mode():
        return model, collect(model, lambda: model(torch.zeros(1, 1, dtype=torch.int64)))


@pytest.mark.parametrize("name", PRUNED_BY_LIBRARY)
def test_pruning_reaches_them(name: str, dense: DenseModel, tmp_path: Path) -> None:
    method: Method = build_method(shipped_step(name))
    if method.needs.missing_modules():
        pytest.skip(f"{name} needs {', '.join(method.needs.missing_modules())}")
    claim = method.compress(dense, CALIBRATION, tmp_path)
    model, found = evidence(tiny.dense_model(tmp_path))
    for block in model.model.layers:
        for weight in (block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj):
            assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert claim.sparsity == pytest.approx(found.sparsity, abs=1e-6)
    wrong = flags(claim, found)
    assert not [flag for flag in wrong if "kernel" not in flag], wrong


def test_the_evidence_counts_them_among_the_linear_layers(dense: DenseModel, tmp_path: Path) -> None:
    """Zeros and bits of attention alone are those of a twentieth of the weights."""
    source: Any = dense.load()
    for layer in source.modules():
        if type(layer) is nn.Linear and layer is not source.lm_head:
            layer.weight.data.zero_()
    source.save_pretrained(tmp_path)
    model, found = evidence(tiny.dense_model(tmp_path))
    (experts,) = (layer for layer in found.layers if layer.layer == "OlmoeExperts")
    weights = sum(p.numel() for block in model.model.layers for p in block.mlp.experts.parameters())
    assert (experts.role, experts.count, experts.parameters, experts.bytes) == ("linear", 2, weights, 2 * weights)
    attention = sum(layer.weight.numel() for name, layer in model.named_modules() if "self_attn" in name and type(layer) is nn.Linear)
    assert found.sparsity == pytest.approx(attention / (attention + weights), abs=1e-3)
    assert found.effective_bits == 16
    assert flags(Claim("huggingface", sparsity=0.5), found) == [f"claims 50% zeros, has {found.sparsity:.0%}"]


def test_the_evidence_reads_the_runs_of_turned_experts() -> None:
    class Turned(nn.Module):
        is_transposed = True

        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            self.down_proj = nn.Parameter(weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.down_proj[0]

    torch.manual_seed(0)
    weight = torch.randn(4, 64, 96)
    order = torch.rand(4, 16, 4, 96).argsort(2)
    weight.view(4, 16, 4, 96).scatter_(2, order[:, :, :2], 0)
    layer = Turned(weight)
    (found,) = collect(layer, lambda: layer(torch.ones(1, 64))).layers
    assert (found.role, found.pattern, found.zeros) == ("linear", "2:4", 0.5)
