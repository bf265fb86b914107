"""The description of a decoder block names every tensor once, and what it calls a head or a channel can be cut as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimbench.methods.base import Unsupported
from slimbench.methods.core.architecture import surgery
from slimbench.methods.core.architecture.anatomy import MLP, Block, Experts, anatomy
from slimbench.methods.formats.architecture.structure import blocks_of
from tests.support import tiny
from tests.support.architectures import make

IDS = tiny.tokens(2, 24, seed=3).ids
DENSE = ["llama", "qwen2", "qwen3", "gemma", "opt"]
EXPERTS = ["mixtral", "olmoe"]


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def modules(block: Block) -> list[nn.Module]:
    """All that the description of a block names."""
    attention = block.attention
    feed = [*block.feed.makes, block.feed.down] if isinstance(block.feed, MLP) else [block.feed.router, block.feed.stack]
    return [*block.norms, attention.q, attention.k, attention.v, attention.out, *attention.norms, *feed]


@pytest.mark.parametrize("architecture", [*DENSE, *EXPERTS])
def test_every_tensor_of_a_block_belongs_to_one_part(architecture: str) -> None:
    model = make(architecture)
    for block, (name, module) in zip(anatomy(model), blocks_of(model).items(), strict=True):
        held = [parameter for part in modules(block) for parameter in part.parameters()]
        assert block.name == name and block.module is module
        assert sorted(map(id, held)) == sorted(map(id, module.parameters()))
        assert all(model.get_submodule(block.name_of(part)) is part for part in modules(block))


def test_sizes_are_those_of_the_tensors() -> None:
    first = {name: anatomy(make(name))[0] for name in [*DENSE, *EXPERTS]}
    attentions = {name: (a.groups, a.repeats, a.head_dim) for name, block in first.items() if (a := block.attention)}
    assert attentions == {
        "llama": (2, 2, 16),
        "qwen2": (1, 4, 16),
        "qwen3": (2, 2, 24),
        "gemma": (2, 2, 16),
        "opt": (4, 1, 16),
        "mixtral": (2, 2, 16),
        "olmoe": (2, 2, 16),
    }
    assert [name for name, block in first.items() if block.attention.joined] == ["olmoe"]
    assert [name for name in DENSE if first[name].mlp.gate is None] == ["opt"]
    for name in EXPERTS:
        feed = first[name].feed
        assert isinstance(feed, Experts) and (feed.count, feed.channels) == (4, 128)
        with pytest.raises(Unsupported, match="DecoderLayer has 4 experts in one tensor"):
            _ = first[name].mlp


def cut_group(model: Any, block: Block) -> Callable[[Block], None]:
    """Cut the first key and value head with its queries; what is returned masks the same in another model."""
    attention, groups = block.attention, block.attention.groups
    left, width = torch.arange(1, groups), attention.repeats * attention.head_dim
    for layer in (attention.q, attention.k, attention.v):
        for tensor, _ in list(layer.named_parameters()):
            surgery.keep(model, f"{block.name_of(layer)}.{tensor}", left, groups, 0)
    surgery.keep(model, f"{block.name_of(attention.out)}.weight", left, groups, 1)
    assert attention.groups == groups - 1 and attention.repeats * attention.head_dim == width

    def mask(other: Block) -> None:
        other.attention.out.weight[:, :width] = 0

    return mask


def cut_channels(model: Any, block: Block) -> Callable[[Block], None]:
    """Cut every fourth channel of an MLP, or of all experts."""
    gone = torch.arange(0, 128, 4)
    left = torch.tensor([channel for channel in range(128) if channel % 4])
    if isinstance(block.feed, Experts):
        stack = block.name_of(block.feed.stack)
        surgery.keep(model, f"{stack}.gate_up_proj", torch.cat([left, 128 + left]), 256, 1)
        surgery.keep(model, f"{stack}.down_proj", left, 128, 2)
        assert block.feed.channels == len(left)
    else:
        for layer in block.feed.makes:
            for tensor, _ in list(layer.named_parameters()):
                surgery.keep(model, f"{block.name_of(layer)}.{tensor}", left, 128, 0)
        surgery.keep(model, f"{block.name_of(block.feed.down)}.weight", left, 128, 1)

    def mask(other: Block) -> None:
        down = other.feed.stack.down_proj if isinstance(other.feed, Experts) else other.feed.down.weight
        down[..., gone] = 0

    return mask


@pytest.mark.parametrize(
    ("cut", "architecture"),
    [(cut_group, name) for name in ("llama", "qwen3", "gemma", "opt", "mixtral")] + [(cut_channels, name) for name in [*DENSE, *EXPERTS]],
)
def test_a_cut_model_equals_one_with_the_same_masked(cut: Callable[..., Any], architecture: str) -> None:
    model, masked = make(architecture), make(architecture)
    want = logits(model)
    mask = cut(model, anatomy(model)[1])
    with torch.no_grad():
        mask(anatomy(masked)[1])
    assert not torch.allclose(logits(masked), want, atol=1e-3)
    torch.testing.assert_close(logits(model), logits(masked), rtol=1e-4, atol=1e-5)
    assert [len(modules(block)) for block in anatomy(model)] == [len(modules(block)) for block in anatomy(masked)]


@pytest.mark.parametrize(
    ("architecture", "more", "message"),
    [
        ("gpt2", {}, "GPT2Block is not built like Llama, OPT or Mixtral: it has no attention and no MLP"),
        ("gemma2", {}, "Gemma2DecoderLayer is not built like"),
        ("phi", {}, "PhiDecoderLayer is not built like"),
        ("qwen2-moe", {}, "Qwen2MoeSparseMoeBlock is not built like Llama, OPT or Mixtral: it holds shared_expert"),
        ("opt", {"do_layer_norm_before": False}, "OPTDecoderLayer is not built like"),
    ],
)
def test_what_is_built_differently_is_refused(architecture: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported, match=message) as caught:
        anatomy(make(architecture, **more))
    assert "\n" not in str(caught.value)


def _factor(model: Any) -> None:
    surgery.factorize(model, "model.layers.1.mlp.up_proj", torch.ones(4, 64), torch.ones(128, 4))


def _adapt(model: Any) -> None:
    model.model.layers[1].mlp.adapter = nn.Linear(64, 64)


def _sink(model: Any) -> None:
    model.model.layers[1].self_attn.sinks = nn.Parameter(torch.zeros(4))


def _halve_values(model: Any) -> None:
    surgery.keep(model, "model.layers.1.self_attn.v_proj.weight", torch.tensor([0]), 2, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_factor, "LlamaDecoderLayer is not built like .*: mlp.up_proj is a FactorPair"),
        (_adapt, "LlamaMLP .*: it holds adapter"),
        (_sink, "LlamaAttention .*: it holds sinks"),
        (lambda model: surgery.remove_part(model, "model.layers.1", "attention"), "NoAttention .*: q_proj is missing"),
        (
            lambda model: surgery.keep(model, "model.layers.1.self_attn.v_proj.weight", torch.tensor([0]), 2, 0),
            "of 64, 32, 16, 64 features",
        ),
    ],
)
def test_what_other_methods_have_put_in_or_taken_out_is_refused(change: Callable[[Any], None], message: str) -> None:
    model = make("llama")
    change(model)
    with pytest.raises(Unsupported, match=message):
        anatomy(model)
