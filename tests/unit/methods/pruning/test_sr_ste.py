"""SR-STE: its gradient and its update against loops over single weights, and the pattern of what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from slimbench.methods.base import DenseModel, Unsupported
from slimbench.methods.core.training import batch, cut
from slimbench.methods.pruning.training.sr_ste import SRSTE, Masks, masked
from tests.support import tiny

TOKENS = tiny.tokens(8, 32)
PLAIN: dict[str, Any] = {"batch_size": 2, "length": 16, "schedule": "constant", "warmup": 0.0, "clip": None}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"), "float32", num_hidden_layers=1)


def left(weight: Tensor, n: int, m: int) -> Tensor:
    """1 for the m - n largest of each m consecutive inputs, 0 for the n others."""
    kept = torch.ones_like(weight)
    for row in range(len(weight)):
        for first in range(0, weight.shape[1], m):
            run = sorted(range(first, first + m), key=lambda index, row=row: (abs(float(weight[row, index])), index))
            for index in run[:n]:
                kept[row, index] = 0
    return kept


@pytest.mark.parametrize(("pattern", "decay"), [("2:4", 0.3), ("2:8", 0.3), ("1:4", 0.0)])
def test_the_gradient_is_that_of_the_masked_weight_and_the_decay(pattern: str, decay: float) -> None:
    """∂L/∂W̃ + λ (1 − M) ⊙ W with W̃ = W ⊙ M, element by element; the last layer's by the rule of a product."""
    torch.manual_seed(0)
    layer, inputs, pull = nn.Linear(8, 3), torch.randn(5, 8), torch.randn(5, 3)
    n, m = (int(part) for part in pattern.split(":"))
    masks = Masks({"it": layer.weight}, pattern, decay)
    with masked({"it": layer}, masks):
        made = layer(inputs)
        (made * pull).sum().backward()
    kept, weight = left(layer.weight.detach(), n, m), layer.weight.detach()
    wanted_out = torch.zeros(5, 3)
    for token in range(5):
        for row in range(3):
            terms = sum(float(inputs[token, index] * weight[row, index] * kept[row, index]) for index in range(8))
            wanted_out[token, row] = terms + float(layer.bias.detach()[row])
    torch.testing.assert_close(made.detach(), wanted_out, rtol=1e-5, atol=1e-5)
    masks.after_backward(0)
    for row in range(3):
        for index in range(8):
            straight = sum(float(pull[token, row] * inputs[token, index]) for token in range(5))
            wanted = straight + decay * (1 - float(kept[row, index])) * float(weight[row, index])
            assert float(layer.weight.grad[row, index]) == pytest.approx(wanted, abs=1e-5)  # type: ignore[index]
    assert "forward" not in vars(layer)


def test_a_run_is_the_papers(dense: DenseModel, tmp_path: Path) -> None:
    """Dense weights that live on beside the masked ones, all updated; λ so large that it shows."""
    method = SRSTE(steps=5, decay=0.5, learning_rate=3e-3, **PLAIN)
    claim = method.compress(dense, TOKENS, tmp_path)
    model: Any = dense.load(dtype=torch.float32)
    layers = tiny.block_layers(model)
    whole = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    first = {name: left(weight, 2, 4) for name, weight in whole.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(5):
        kept = {name: left(weight, 2, 4) for name, weight in whole.items()}
        for name, layer in layers.items():
            layer.weight.data.copy_(whole[name] * kept[name])
        ids = batch(cut(TOKENS.ids, 16), method, step)
        functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        for name, layer in layers.items():
            layer.weight.grad += 0.5 * (1 - kept[name]) * whole[name]
            layer.weight.data.copy_(whole[name])
        optimizer.step()
        optimizer.zero_grad()
        whole = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    made, changed = load_file(tmp_path / "model.safetensors"), 0
    for name, weight in whole.items():
        kept_last = left(weight, 2, 4)
        torch.testing.assert_close(made[f"{name}.weight"], weight * kept_last, rtol=1e-4, atol=1e-5)
        assert ((made[f"{name}.weight"] == 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()
        changed += int((kept_last != first[name]).sum())
    total = sum(weight.numel() for weight in whole.values())
    assert claim.details["mask_changed"] == pytest.approx(changed / total, abs=1e-3) and changed > 0.01 * total
    assert claim.sparsity == 0.5 and claim.pattern == "2:4" and claim.training_tokens == 5 * 2 * 16


def test_other_patterns_and_what_does_not_fit(dense: DenseModel, tmp_path: Path) -> None:
    method = SRSTE(pattern="4:8", steps=2, batch_size=2, length=16)
    assert method.compress(dense, TOKENS, tmp_path).pattern == "4:8"
    weight = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert ((weight == 0).unflatten(1, (-1, 8)).sum(-1) == 4).all()
    with pytest.raises(Unsupported, match="pattern 2:6 does not divide the input features 64"):
        SRSTE(pattern="2:6", sparsity=1 / 3).check(dense.shape)
    with pytest.raises(ValueError, match="decay must not be negative"):
        SRSTE(decay=-1.0)
    with pytest.raises(ValueError, match="pattern 1:4 means sparsity"):
        SRSTE(pattern="1:4")
