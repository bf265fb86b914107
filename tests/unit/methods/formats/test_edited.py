"""The format `edited`: every edit, on three architectures, comes back from disk as it was in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.stages.models import shape_of
from slimbench.methods.base import Unsupported
from slimbench.methods.core.architecture import surgery
from slimbench.methods.formats import edited, packed
from slimbench.methods.formats.architecture.edits import Insert, apply, edits_of
from slimbench.methods.formats.huggingface import save_dense
from slimbench.methods.quantization.weight.rtn import RTN
from tests.support import tiny
from tests.support.architectures import make

IDS = tiny.tokens(2, 24, seed=3).ids


def block(model: Any, index: int = 1) -> str:
    return f"{'model.decoder' if hasattr(model.model, 'decoder') else 'model'}.layers.{index}"


def cut_heads(model: Any) -> None:
    """The first group of heads of a block goes: with one key and value head of two, or one head of four."""
    name = f"{block(model)}.self_attn"
    attention = model.get_submodule(name)
    groups = attention.k_proj.out_features // attention.head_dim
    left = torch.arange(1, groups)
    for layer in ("q_proj", "k_proj", "v_proj"):
        surgery.keep(model, f"{name}.{layer}.weight", left, groups, 0)
        if attention.get_submodule(layer).bias is not None:
            surgery.keep(model, f"{name}.{layer}.bias", left, groups, 0)
    output = "o_proj" if hasattr(attention, "o_proj") else "out_proj"
    surgery.keep(model, f"{name}.{output}.weight", left, groups, 1)


def cut_channels(model: Any) -> None:
    """Half of the channels of an MLP go; of experts, one of four goes and half of the channels of the others."""
    name, left = block(model), torch.arange(0, 128, 2)
    inside = model.get_submodule(name)
    if hasattr(inside, "fc1"):
        for tensor, dim in (("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", 1)):
            surgery.keep(model, f"{name}.{tensor}", left, 128, dim)
    elif hasattr(inside.mlp, "experts"):
        experts = torch.tensor([0, 1, 3])
        for tensor in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
            surgery.keep(model, f"{name}.mlp.{tensor}", experts, 4, 0)
        surgery.keep(model, f"{name}.mlp.experts.gate_up_proj", torch.cat([left, 128 + left]), 256, 1)
        surgery.keep(model, f"{name}.mlp.experts.down_proj", left, 128, 2)
    else:
        for tensor, dim in (("gate_proj.weight", 0), ("up_proj.weight", 0), ("down_proj.weight", 1)):
            surgery.keep(model, f"{name}.mlp.{tensor}", left, 128, dim)


def cut_hidden(model: Any) -> None:
    """Hidden states of 48 numbers: every embedding, norm and layer that reads or writes them."""
    width, left = 64, torch.arange(48)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, parameter in list(model.named_parameters()):
        owner, leaf = name.split(".")[-2:]
        if parameter.dim() == 1 and leaf == "bias" and owner in ("q_proj", "k_proj", "v_proj", "fc1"):
            continue
        if parameter.dim() == 1 or owner in ("o_proj", "out_proj", "down_proj", "fc2"):
            dims = [0]
        elif leaf == "gate_up_proj":
            dims = [2]
        else:
            dims = [1]
        for dim in dims:
            surgery.keep(model, name, left, width, dim)
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
        model.get_output_embeddings().in_features = 48


def bias(model: Any) -> None:
    name = f"{block(model)}.self_attn." + ("o_proj" if hasattr(model.get_submodule(block(model)).self_attn, "o_proj") else "out_proj")
    if model.get_submodule(name).bias is not None:
        pytest.skip("has biases")
    surgery.add_bias(model, name, torch.linspace(-1, 1, 64))


def factor(model: Any) -> None:
    name = f"{block(model)}.self_attn.q_proj"
    left, values, right = torch.linalg.svd(model.get_submodule(name).weight.detach().float())
    surgery.factorize(model, name, right[:8], left[:, :8] * values[:8])


def insert_adapters(model: Any) -> None:
    mlp = "fc2" if hasattr(model.get_submodule(block(model)), "fc2") else "mlp"
    for part, kind, place, arguments in (
        ("self_attn", "bottleneck", "after", {"width": 64, "size": 4, "activation": "relu"}),
        ("self_attn", "norm", "before", {"width": 64, "eps": 1e-5}),
        (mlp, "linear", "after", {"inputs": 64, "outputs": 64, "bias": True}),
    ):
        name = f"inserted_{kind}"
        apply(model, Insert(f"{block(model)}.{part}", name, kind, place, arguments))  # type: ignore[arg-type]
        for parameter in model.get_submodule(f"{block(model)}.{part}.{name}").parameters():
            torch.nn.init.normal_(parameter, 0.5, 0.3)


EDITS: dict[str, Callable[[Any], None]] = {
    "heads": cut_heads,
    "channels": cut_channels,
    "hidden": cut_hidden,
    "bias": bias,
    "factor": factor,
    "attention": lambda model: surgery.remove_part(model, block(model, 0), "attention"),
    "mlp": lambda model: surgery.remove_part(model, block(model, 2), "mlp"),
    "block": lambda model: (surgery.remove_blocks(model, [0]), cut_heads(model)),  # type: ignore[dict-item]
    "insert": insert_adapters,
    "vocabulary": lambda model: surgery.keep_tokens(model, torch.cat([torch.tensor([7]), torch.arange(20, 200)])),
}


def through_cache(model: Any, ids: Tensor) -> Tensor:
    """Logits of a text that goes through the engine's cache in uneven pieces."""
    engine, parts, state = TransformersModel(model, "cpu"), [], None
    for piece in ids.split([9, 1, 1, ids.shape[1] - 11], 1):
        logits, state = engine.extend(piece, state)
        parts.append(logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("architecture", ["llama", "opt", "mixtral"])
@pytest.mark.parametrize("name", EDITS)
def test_an_edited_model_comes_back_as_it_was(name: str, architecture: str, tmp_path: Path) -> None:
    model = make(architecture)
    with torch.inference_mode():
        before = model(IDS).logits
    parameters = model.num_parameters()
    EDITS[name](model)
    with torch.inference_mode():
        want = model(IDS).logits
    assert not torch.allclose(want, before, atol=1e-3), "the edit changes nothing"
    save_dense(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"config.json", "model.safetensors", "edited.json"}
    again = edited.load(tmp_path)
    with torch.inference_mode():
        torch.testing.assert_close(again(IDS).logits, want, rtol=0, atol=0)
        torch.testing.assert_close(through_cache(again, IDS), want, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(generated(again), generated(model), rtol=0, atol=0)
    found = TransformersModel(again, "cpu").evidence()
    assert found.parameters == sum(p.numel() for p in model.parameters()) != parameters
    assert found.blocks == (2 if name == "block" else 3)
    assert shape_of(tmp_path).num_layers == 3 and edited.shape_of(tmp_path).num_layers == found.blocks
    assert surgery.counts(again) == {"parameters": found.parameters, "layers": found.blocks}


def generated(model: Any) -> Tensor:
    engine = TransformersModel(model, "cpu")
    step, tokens = engine.prefill(IDS[:, :8]), []
    for _ in range(6):
        tokens.append(step.token)
        step = engine.decode_step(step)
    return torch.cat(tokens, 1)


@pytest.mark.parametrize("architecture", ["llama", "opt", "mixtral"])
def test_edits_follow_one_another_and_are_taken_up_again(architecture: str, tmp_path: Path) -> None:
    model = make(architecture)
    for name in ("heads", "factor", "attention"):
        EDITS[name](model)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    save_dense(model, tmp_path / "one")
    again = edited.load(tmp_path / "one")
    surgery.remove_blocks(again, [0])
    surgery.remove_part(again, block(again, 1), "mlp")
    save_dense(again, tmp_path / "two")
    third = edited.load(tmp_path / "two")
    assert len(edits_of(third)) == len(edits_of(model)) + 2
    with torch.inference_mode():
        torch.testing.assert_close(third(IDS).logits, again(IDS).logits, rtol=0, atol=0)
        torch.testing.assert_close(through_cache(third, IDS), again(IDS).logits, rtol=1e-3, atol=1e-4)


def test_removed_parts_are_absent_and_their_cache_too(tmp_path: Path) -> None:
    """A block without attention equals one whose attention adds nothing, and only two blocks keep keys and values."""
    model, masked = make("llama"), make("llama")
    surgery.remove_part(model, "model.layers.0", "attention")
    with torch.no_grad():
        masked.model.layers[0].self_attn.o_proj.weight.zero_()
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS).logits, masked(IDS).logits)
    assert surgery.cache_bytes_per_token(model) * 3 == surgery.cache_bytes_per_token(masked) * 2
    assert [b.self_attn.layer_idx for b in list(model.model.layers)[1:]] == [0, 1]
    surgery.remove_part(model, "model.layers.1", "attention")
    with pytest.raises(Unsupported, match="the last attention"):
        surgery.remove_part(model, "model.layers.2", "attention")


def test_a_small_vocabulary_reads_and_predicts_the_tokens_that_are_left() -> None:
    model, whole = make("llama"), make("llama")
    kept = torch.arange(40, 140)
    surgery.keep_tokens(model, kept)
    ids = kept[torch.randint(0, 100, (2, 16), generator=torch.Generator().manual_seed(0))]
    with torch.inference_mode():
        got, want = model(ids).logits, whole(ids).logits
    torch.testing.assert_close(got[..., kept], want[..., kept])
    assert got.shape == want.shape and (got.argmax(-1) >= 40).all() and (got.argmax(-1) < 140).all()
    assert bool(torch.isfinite(got).all())


def test_only_whole_blocks_gone_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = make("llama")
    surgery.remove_blocks(model, [1])
    save_dense(model, tmp_path)
    assert not (tmp_path / "edited.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
@pytest.mark.parametrize("name", [name for name in EDITS if name not in ("hidden",)])
def test_packed_layers_stand_on_an_edited_base(name: str, architecture: str, tmp_path: Path) -> None:
    model = make(architecture, torch.bfloat16)
    EDITS[name](model)
    (base := tmp_path / "base").mkdir()
    (out := tmp_path / "out").mkdir()
    save_dense(model, base)
    dense = tiny.dense_model(base, format="edited")
    claim = RTN(bits=8, group_size=None).compress(dense, None, out)
    quantized = packed.load(out)
    layers = [layer for layer in quantized.modules() if isinstance(layer, packed.PackedLinear)]
    linear = [layer for layer in model.modules() if type(layer) is torch.nn.Linear and layer is not model.get_output_embeddings()]
    assert claim.format == "packed" and len(layers) == len(linear)
    with torch.inference_mode():
        got, want = quantized(IDS).logits, model(IDS).logits
    kept = want > -1e30
    assert (got - want)[kept].norm() < 0.05 * want[kept].norm()
    assert TransformersModel(quantized, "cpu").evidence().parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"edit": "run", "code": "import os"}, "an edit that this program does not know"),
        ({"edit": "insert", "module": "model.norm", "as_": "x", "kind": "os", "place": "after", "arguments": {}}, "does not fit"),
        (
            {"edit": "insert", "module": "model.norm", "as_": "forward", "kind": "norm", "place": "after", "arguments": {"width": 64}},
            "no room",
        ),
        ({"edit": "resize", "tensor": "model.norm.forward", "shape": [3]}, "is no parameter of 1 dimensions"),
        ({"edit": "resize", "tensor": "model.nothing.weight", "shape": [3]}, "does not fit"),
        ({"edit": "factor", "module": "model.norm", "rank": 2}, "no nn.Linear"),
        ({"edit": "factor", "module": "lm_head", "rank": 2, "extra": 1}, "does not fit"),
        ({"edit": "remove-block", "module": "model.layers.9"}, "has no block"),
        ({"edit": "remove-part", "module": "model.layers.0", "part": "soul"}, "has no soul"),
    ],
)
def test_what_is_no_edit_is_refused_in_one_line(entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = make("llama")
    factor(model)
    save_dense(model, tmp_path)
    described = json.loads((tmp_path / "edited.json").read_text())
    (tmp_path / "edited.json").write_text(json.dumps(described | {"edits": [entry]}))
    with pytest.raises(ValueError, match=message) as caught:
        edited.load(tmp_path)
    assert "\n" not in str(caught.value)
