"""Folding scales, shifts and rotations leaves a model as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimbench.methods.base import Unsupported
from slimbench.methods.core import statistics as _observe
from slimbench.methods.core.architecture.equivalent import check_norm, links
from slimbench.methods.core.architecture.rotation import orthogonal
from slimbench.methods.core.walk import walk
from slimbench.methods.formats import runtime
from slimbench.methods.formats.architecture.structure import blocks_of
from slimbench.methods.quantization.activation.quarot import rotated
from tests.support import tiny
from tests.support.architectures import make


def randomized(folder: Path, **shape: Any) -> Any:
    """A tiny model in float32 whose norms have gains that are not one."""
    model: Any = tiny.save_model(folder, "float32", **shape).load()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.rand(parameter.shape, generator=generator) + 0.5
    return model


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(tiny.tokens().ids).logits


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_scales_of_all_kinds_change_nothing(tmp_path: Path, kv_heads: int) -> None:
    model = randomized(tmp_path, num_key_value_heads=kv_heads, attention_bias=True)
    want, before = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for name, block in blocks_of(model).items():
        for link in links(model, name, block):
            scale = torch.rand(next(iter(link.layers.values())).in_features, generator=generator) + 0.25
            link.fold_scale(link.shared(scale))
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if "layers" in name and name.endswith("weight")} <= changed


def test_shift_of_values_changes_nothing_and_others_are_refused(tmp_path: Path) -> None:
    model = randomized(tmp_path)
    want = logits(model)
    for name, block in blocks_of(model).items():
        for link in links(model, name, block):
            shift = link.shared(torch.linspace(-1, 2, next(iter(link.layers.values())).in_features))
            if link.kind == "value":
                link.fold_shift(shift)
            else:
                with pytest.raises(Unsupported, match="a shift cannot be folded"):
                    link.fold_shift(shift)
        assert block.self_attn.v_proj.bias is not None and block.self_attn.o_proj.bias is not None
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)


def test_a_norm_with_a_bias_takes_a_shift(tmp_path: Path) -> None:
    model = randomized(tmp_path)
    for block in blocks_of(model).values():
        block.input_layernorm = nn.LayerNorm(64)  # type: ignore[assignment]
    want = logits(model)
    for name, block in blocks_of(model).items():
        link = links(model, name, block)[0]
        link.fold_shift(torch.linspace(-1, 2, 64))
        link.fold_scale(torch.linspace(0.5, 2, 64))
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)


def test_grouped_queries_share_the_scale_of_their_value_head(tmp_path: Path) -> None:
    model = randomized(tmp_path)
    name, block = next(iter(blocks_of(model).items()))
    (link,) = links(model, name, block, ("value",))
    shared = link.shared(torch.arange(64.0)).view(2, 2, 16)
    assert torch.equal(shared[:, 0], shared[:, 1])
    assert torch.equal(shared[:, 0].flatten(), torch.cat((torch.arange(16.0, 32), torch.arange(48.0, 64))))
    lowest = link.shared(torch.arange(64.0), "amin").view(2, 2, 16)
    assert torch.equal(lowest[:, 1].flatten(), torch.cat((torch.arange(16.0), torch.arange(32.0, 48))))


@pytest.mark.parametrize("fold", ["scale", "shift"])
def test_norms_and_values_of_opt_take_scales_and_shifts(fold: str) -> None:
    model = make("opt")
    want = logits(model)
    for name, block in blocks_of(model).items():
        found = links(model, name, block, ("norm", "value"))
        assert [list(link.layers) for link in found] == [
            [f"{name}.self_attn.{part}_proj" for part in "qkv"],
            [f"{name}.self_attn.out_proj"],
            [f"{name}.fc1"],
        ]
        for link in found:
            if fold == "scale":
                link.fold_scale(torch.linspace(0.5, 2, 64))
            else:
                link.fold_shift(torch.linspace(-1, 1, 64))
        assert not torch.equal(block.fc1.weight if fold == "scale" else block.fc1.bias, _fresh(name, fold))
    torch.testing.assert_close(logits(model), want, rtol=1e-3, atol=1e-4)


def _fresh(name: str, fold: str) -> Tensor:
    layer = make("opt").get_submodule(f"{name}.fc1")
    return layer.weight if fold == "scale" else layer.bias


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("gpt2", "GPT2Block is not built like Llama, OPT or Mixtral"),
        ("qwen2-moe", "it holds shared_expert"),
        ("mixtral", "MixtralDecoderLayer has 4 experts in one tensor"),
        ("opt", r"a scale does not pass the activation between .*\.fc1 and .*\.fc2"),
        ("gemma", "GemmaRMSNorm are not proportional to its gain"),
    ],
)
def test_blocks_without_such_links_are_refused(architecture: str, message: str) -> None:
    model = make(architecture)
    name, block = next(iter(blocks_of(model).items()))
    with pytest.raises(Unsupported, match=message):
        links(model, name, block)


def test_norms_with_a_gain_of_one_plus_w_are_refused() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    with pytest.raises(Unsupported, match="not proportional"):
        check_norm(GemmaRMSNorm(32))
    check_norm(nn.LayerNorm(32))


def test_statistics_are_those_of_all_tokens(tmp_path: Path) -> None:
    model = randomized(tmp_path)
    ids, seen = tiny.tokens(70, 32).ids, {}
    caught: dict[str, list[Tensor]] = {}
    for block in walk(model, ids):
        assert len(block.inputs) > 1
        seen |= _observe.inputs(block, gram=True)
        block.observe(lambda name, x: caught.setdefault(name, []).append(x))
    assert len(seen) == 14
    for name, statistics in seen.items():
        x = torch.cat(caught[name])
        assert statistics.tokens == len(x) == 70 * 32
        assert torch.equal(statistics.low, x.amin(0)) and torch.equal(statistics.high, x.amax(0))
        assert torch.equal(statistics.largest, x.abs().amax(0))
        torch.testing.assert_close(statistics.squares, x.square().mean(0))
        assert statistics.gram is not None
        torch.testing.assert_close(statistics.gram, x.T @ x / len(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [64, 96, 576])
def test_rotation_is_orthogonal_and_spreads_every_channel(size: int) -> None:
    rotation = orthogonal(size, 0)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(size, dtype=torch.float64))
    assert (rotation.abs() > 0).all() and rotation.abs().max() < 0.35 * (1 if size > 64 else 0.5)
    assert not torch.equal(rotation, orthogonal(size, 1))


@pytest.mark.parametrize(
    ("shape", "online"),
    [
        ({}, {"o_proj": 64, "down_proj": 128}),
        ({"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 96}, {"down_proj": 32}),
        ({"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}, {"o_proj": 64, "down_proj": 128}),
        *(
            ({"head_dim": width, "num_attention_heads": 2, "num_key_value_heads": kv}, {"o_proj": block, "down_proj": 128})
            for width, block in ((48, 32), (80, 32), (96, 64))
            for kv in (1, 2)
        ),
    ],
)
def test_rotated_model_equals_the_dense_one(tmp_path: Path, shape: dict[str, Any], online: dict[str, int]) -> None:
    model = randomized(tmp_path, **shape)
    want, embeddings = logits(model), model.model.embed_tokens.weight.clone()
    transforms = rotated(model, seed=0)
    assert {name.rpartition(".")[2]: size for name, size in transforms.items()} == online and len(transforms) == 2 * len(online)
    assert not torch.allclose(model.model.embed_tokens.weight, embeddings, atol=1e-3)
    assert all((p == 1).all() for name, p in model.named_parameters() if "norm" in name)
    with runtime.planned(model, {name: runtime.InputPlan(hadamard=size) for name, size in transforms.items()}):
        torch.testing.assert_close(logits(model), want, rtol=1e-3, atol=2e-5)
    assert not torch.allclose(logits(model), want, atol=1e-3)


def test_rotation_needs_norms_that_commute_with_it(tmp_path: Path) -> None:
    model = randomized(tmp_path)
    model.model.norm = nn.LayerNorm(64)
    with pytest.raises(Unsupported, match="LayerNorm does not commute"):
        rotated(model, seed=0)
