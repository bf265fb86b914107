"""Which pairs stay, which directions are kept, and what the artefact's cache takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure.claims import cache_bytes_per_token
from slimbench.methods.base import DenseModel, Unsupported
from slimbench.methods.compact.latent_attention import LatentAttention
from slimbench.methods.core.learning import trained
from slimbench.methods.formats import policy as policies
from tests.support import tiny
from tests.support.policies import far, under

METHOD = LatentAttention(rank=20, pairs=2, steps=12, batch_size=2, length=32, learning_rate=0.01)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"), "float32")


def test_pairs_are_the_strongest_and_directions_the_leading_ones(dense: DenseModel) -> None:
    model, ids = trained.load(dense), tiny.tokens(samples=4, length=32).ids
    pairs, directions = METHOD.begin(model, ids)
    inputs: list[Any] = []
    layer = model.model.layers[1]
    handle = layer.input_layernorm.register_forward_hook(lambda _, __, made: inputs.append(made.detach()))
    with torch.no_grad():
        model(ids)
    handle.remove()
    attention, x = layer.self_attn, inputs[0].flatten(0, 1).double()
    q, k, v = (x @ getattr(attention, f"{name}_proj").weight.double().T for name in "qkv")
    rows = []
    for group in range(2):
        keys = k[:, group * 16 : (group + 1) * 16]
        strength = []
        for pair in range(8):
            asked = [q[:, h * 16 : (h + 1) * 16][:, [pair, pair + 8]].norm(dim=1).mean() for h in (2 * group, 2 * group + 1)]
            strength.append(float(sum(asked) / 2 * keys[:, [pair, pair + 8]].norm(dim=1).mean()))
        best = sorted(sorted(range(8), key=strength.__getitem__)[-2:])
        assert pairs["1.pairs"][group].tolist() == best
        rows.append(keys[:, [c for c in range(16) if c % 8 not in best]])
    joint = torch.cat([*rows, v], 1)
    basis = directions["1.up"].double()
    left = (joint - joint @ basis @ basis.T).square().sum()
    smallest = torch.linalg.svdvals(joint)[20:].square().sum()
    assert float(left) == pytest.approx(float(smallest), rel=1e-4), "no other 20 directions leave less"


def test_with_all_pairs_and_as_many_directions_as_values_it_is_the_base(dense: DenseModel) -> None:
    method, model, ids = LatentAttention(rank=32, pairs=8), trained.load(dense), tiny.tokens(samples=4, length=32).ids
    pairs, directions = method.begin(model, ids)
    policy = replace(method.policy(), parts=pairs | directions)
    wanted = TransformersModel(model, "cpu").logits(ids)
    assert far(under(model, policy).logits(ids), wanted) <= 1e-4
    fewer = {name: part[:31] if name.endswith("down") else part[:, :31] for name, part in directions.items()}
    assert far(under(model, replace(policy, rank=31, parts=pairs | fewer)).logits(ids), wanted) > 1e-3


def test_training_lowers_the_error_and_the_cache_is_as_claimed(dense: DenseModel, tmp_path: Path) -> None:
    claim = METHOD.compress(dense, tiny.tokens(samples=8, length=32), tmp_path)
    course = claim.details["training"]
    assert course["loss_after"] < course["loss_before"]
    model = TransformersModel(policies.load(tmp_path), "cpu")
    assert cache_bytes_per_token(model) == claim.cache_bytes_per_token == 2 * (20 + 2 * 2 * 2) * 4
    assert claim.parameters == sum(p.numel() for p in model.module.parameters())


def test_a_vector_longer_than_what_it_stands_for_is_refused(dense: DenseModel) -> None:
    with pytest.raises(Unsupported, match="more than the 48 they stand for"):
        LatentAttention(rank=128, pairs=4).check(dense.shape)
