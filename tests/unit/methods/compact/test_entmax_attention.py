"""An α for each head that learns from the text, and an artefact that attends with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.methods.base import Calibration, DenseModel
from slimbench.methods.compact.entmax_attention import EntmaxAttention, alphas, put
from slimbench.methods.core.learning import trained
from slimbench.methods.formats import policy as policies
from tests.support import tiny

METHOD = EntmaxAttention(steps=10, batch_size=4, length=32, start=1.5)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """A model with sharp attentions, in float32."""
    folder = tmp_path_factory.mktemp("dense")
    model = tiny.save_model(folder / "plain", "float32").load()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return tiny.saved(model, folder / "sharp")


def test_alpha_is_one_and_a_sigmoid_of_what_learns(dense: DenseModel) -> None:
    model = trained.load(dense)
    raw = put(model, 1.25)
    assert all(torch.allclose(alpha, torch.tensor(1.25)) for alpha in alphas(model).values())
    raw["1.alpha"].data = torch.tensor([-2.0, 0.0, 1.0, 3.0])
    assert torch.allclose(alphas(model)["1.alpha"], 1 + 1 / (1 + torch.exp(-raw["1.alpha"].detach())))
    model(input_ids=tiny.tokens(samples=2, length=16).ids, use_cache=False).logits.square().mean().backward()
    assert all(value.grad is not None and (value.grad != 0).all() for value in raw.values())
    assert all(not parameter.requires_grad for name, parameter in model.named_parameters() if "operator" not in name)


def test_heads_learn_and_the_artefact_attends_with_what_was_learned(dense: DenseModel, tmp_path: Path) -> None:
    ids = tiny.tokens(samples=8, length=32).ids
    claim = METHOD.compress(dense, Calibration(ids, "tiny"), tmp_path)
    policy = policies.read(tmp_path)[0][0]
    learned = policy.alphas  # type: ignore[attr-defined]
    assert set(learned) == {"0.alpha", "1.alpha"}
    assert len({float(alpha) for values in learned.values() for alpha in values}) == 8, "heads differ"
    assert claim.details["alpha_mean"] == pytest.approx(float(torch.cat(list(learned.values())).mean()), abs=1e-6)
    assert claim.details["training"]["loss_after"] < claim.details["training"]["loss_before"]
    assert claim.teacher is None, "alphas learn from the text"
    assert claim.trained_parameters == 8 and claim.training_tokens == 10 * 4 * 32
    assert claim.parameters == sum(p.numel() for p in trained.load(dense).parameters()) + 8
    found = TransformersModel(policies.load(tmp_path), "cpu")
    module = trained.load(dense)
    put(module, 1.5)
    for block, alpha in zip(module.model.layers, learned.values(), strict=True):
        block.self_attn.operator.alpha = alpha
    with torch.no_grad():
        wanted = module(input_ids=ids[:2], use_cache=False).logits
    assert torch.allclose(found.logits(ids[:2]), wanted, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("start", [1.0, 2.0, 0.5])
def test_starts_out_of_range_are_refused(start: float) -> None:
    with pytest.raises(ValueError, match="start must lie between 1 and 2"):
        EntmaxAttention(start=start)
