"""Means of heads against sums that are written out, equal heads that stay, and caches that are smaller by their number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.methods.base import Unsupported
from slimbench.methods.compact.grouped_query import GroupedQuery, grouped, mean
from slimbench.methods.core.learning import trained
from slimbench.methods.formats import huggingface
from tests.support import tiny

HEADS, WIDTH = {"num_attention_heads": 8, "num_key_value_heads": 4}, 8
METHOD = GroupedQuery(groups=2, steps=6, batch_size=2, length=16)


def test_a_new_head_is_the_mean_of_those_of_its_group(tmp_path: Path) -> None:
    model = trained.load(tiny.save_model(tmp_path, "float32", attention_bias=True, **HEADS))
    made = grouped(model, 2)
    for before, after in zip(model.model.layers, made.model.layers, strict=True):
        for name in ("k_proj", "v_proj"):
            old, new = getattr(before.self_attn, name), getattr(after.self_attn, name)
            for group in range(2):
                members = range(2 * group, 2 * group + 2)
                rows = [old.weight[member * WIDTH : (member + 1) * WIDTH] for member in members]
                assert torch.allclose(new.weight[group * WIDTH : (group + 1) * WIDTH], sum(rows) / 2)
                biases = [old.bias[member * WIDTH : (member + 1) * WIDTH] for member in members]
                assert torch.allclose(new.bias[group * WIDTH : (group + 1) * WIDTH], sum(biases) / 2)
        assert torch.equal(before.self_attn.q_proj.weight, after.self_attn.q_proj.weight)
    assert made.lm_head.weight is made.model.embed_tokens.weight


def test_heads_that_are_equal_lose_nothing(tmp_path: Path) -> None:
    dense = tiny.save_model(tmp_path, "float32", **HEADS)
    model, ids = trained.load(dense), tiny.tokens().ids
    for block in model.model.layers:
        for name in ("k_proj", "v_proj"):
            layer = getattr(block.self_attn, name)
            layer.weight.data = mean(layer.weight.data, 4, 2).unflatten(0, (2, WIDTH)).repeat_interleave(2, 0).flatten(0, 1)
    assert torch.allclose(grouped(model, 2)(ids).logits, model(ids).logits, atol=1e-5)


def test_the_checkpoint_has_the_smaller_cache_that_it_claims(tmp_path: Path) -> None:
    dense = tiny.save_model(tmp_path / "dense", "float32", **HEADS)
    (tmp_path / "out").mkdir()
    claim = METHOD.compress(dense, tiny.tokens(samples=4, length=16), tmp_path / "out")
    ids = tiny.tokens().ids
    sizes = []
    for folder in (dense.path, tmp_path / "out"):
        model = TransformersModel(huggingface.load(folder), "cpu")
        sizes.append(model.cache_bytes(model.prefill(ids).state))
    assert sizes[0] == 2 * (sizes[1] or 0)
    assert claim.cache_bytes_per_token == 2 * 2 * 2 * WIDTH * 4, "keys and values of two heads in two blocks"
    assert claim.parameters == sum(p.numel() for p in model.module.parameters()) and claim.trained_parameters == claim.parameters


def test_training_starts_from_the_means(tmp_path: Path) -> None:
    dense = tiny.save_model(tmp_path / "dense", "float32", **HEADS)
    (tmp_path / "out").mkdir()
    method = GroupedQuery(groups=1, steps=60, batch_size=4, length=32, learning_rate=1e-3)
    claim = method.compress(dense, tiny.tokens(samples=8), tmp_path / "out")
    course = claim.details["training"]
    assert course["loss_after"] < course["loss_before"]


@pytest.mark.parametrize("groups", [3, 4, 8])
def test_groups_that_do_not_divide_are_refused(tmp_path: Path, groups: int) -> None:
    with pytest.raises(Unsupported, match="4 heads of keys and values do not become"):
        GroupedQuery(groups=groups).check(tiny.save_model(tmp_path, **HEADS).shape)


def test_what_else_depends_on_heads_is_refused(tmp_path: Path) -> None:
    from transformers import OlmoeConfig

    shape = tiny.SHAPE | HEADS | {"num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}
    with pytest.raises(Unsupported, match="k_norm"):
        grouped(trained.load(tiny.save(OlmoeConfig(**shape), tmp_path, "float32")), 2)
