"""Dropping of sub-layers against ratios of norms token by token, on tiny random models."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.methods.base import Calibration, Claim, DenseModel, Unsupported
from slimbench.methods.formats import edited
from slimbench.methods.pruning.depth.sublayers import SublayerDropping, weakest
from tests.support import tiny
from tests.support.architectures import make

CALIBRATION = tiny.tokens(samples=5, length=24)
PARTS = {
    "llama": (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp")),
    "opt": (("self_attn_layer_norm", "self_attn"), ("final_layer_norm", "fc2")),
}
PARTS["mixtral"] = PARTS["llama"]
LAST = {"self_attn": ("o_proj", "out_proj"), "mlp": ("down_proj", "experts"), "fc2": ("",)}
STRENGTH = (3.0, 0.2, 0.9, 2.5, 0.05, 1.6)
"""How much louder than they were drawn the six sub-layers are, in the order in which they run."""


def blocks(model: Any) -> Any:
    return model.model.decoder.layers if hasattr(model.model, "decoder") else model.model.layers


def written(block: Any, last: str) -> list[Any]:
    """The parameters by which a sub-layer writes."""
    module = block.get_submodule(last)
    names = [name for name, _ in module.named_parameters() if name.startswith(LAST[last])]
    return [module.get_parameter(name) for name in names if not name.endswith("gate_up_proj")]


def uneven(architecture: str) -> Any:
    """A model whose sub-layers add more or less."""
    model = make(architecture)
    with torch.no_grad():
        for number, strength in enumerate(STRENGTH):
            for parameter in written(blocks(model)[number // 2], PARTS[architecture][number % 2][1]):
                parameter.mul_(strength)
    return model


def compressed(dense: DenseModel, out: Path, ratio: float = 0.25) -> Claim:
    out.mkdir()
    return SublayerDropping(ratio=ratio).compress(dense, CALIBRATION, out)


def transcribed(model: Any, parts: tuple[tuple[str, str], ...]) -> list[float]:
    """E ‖f(x)‖ / ‖x‖ of the sub-layers in the order in which they run, token by token."""
    seen: dict[tuple[int, int, str], list[list[float]]] = {}

    def note(key: tuple[int, int, str], _: Any, args: Any, made: Any = None) -> None:
        states = args[0] if key[2] == "x" else made[0] if isinstance(made, tuple) else made
        seen.setdefault(key, []).extend(states.detach().reshape(-1, 64).double().tolist())

    hooks = []
    for index, block in enumerate(blocks(model)):
        for place, (norm, last) in enumerate(parts):
            hooks.append(block.get_submodule(norm).register_forward_pre_hook(partial(note, (index, place, "x"))))
            hooks.append(block.get_submodule(last).register_forward_hook(partial(note, (index, place, "f"))))
    with torch.inference_mode():
        for sample in CALIBRATION.ids.split(1):
            model(sample, use_cache=False)
    for hook in hooks:
        hook.remove()
    means = []
    for index in range(len(blocks(model))):
        for place in range(2):
            pairs = zip(seen[index, place, "f"], seen[index, place, "x"], strict=True)
            ratios = [math.sqrt(sum(v * v for v in f)) / math.sqrt(sum(v * v for v in x)) for f, x in pairs]
            assert len(ratios) == 120
            means.append(sum(ratios) / 120)
    return means


@pytest.mark.parametrize("architecture", ["llama", "opt", "mixtral"])
def test_the_sublayers_go_that_add_least_to_their_inputs(architecture: str, tmp_path: Path) -> None:
    dense, parts = tiny.saved(uneven(architecture), tmp_path / "model"), PARTS[architecture]
    claim = compressed(dense, tmp_path / "out", 0.5)
    whole, model = dense.load(), edited.load(tmp_path / "out")
    want = transcribed(whole, parts)
    assert [value for pair in zip(claim.details["attention_change"], claim.details["mlp_change"], strict=True) for value in pair] == [
        pytest.approx(value, rel=1e-4, abs=1e-6) for value in want
    ]
    gone = sorted(sorted(range(6), key=want.__getitem__)[:3])
    assert {number % 2 for number in gone} == {0, 1}
    names = [name for name, module in whole.named_modules() if module in list(blocks(whole))]
    assert claim.details["attention_removed"] == [names[number // 2] for number in gone if number % 2 == 0]
    assert claim.details["mlp_removed"] == [names[number // 2] for number in gone if number % 2 == 1]
    lost = 0
    for number in gone:
        block = blocks(whole)[number // 2]
        held = [parts[number % 2][0], *(("fc1", "fc2") if parts[number % 2][1] == "fc2" else (parts[number % 2][1],))]
        lost += sum(parameter.numel() for name in held for parameter in block.get_submodule(name).parameters())
    assert claim.parameters == model.num_parameters() == whole.num_parameters() - lost
    attentions = 3 - sum(number % 2 == 0 for number in gone)
    groups = 4 if architecture == "opt" else 2
    assert claim.cache_bytes_per_token == attentions * 2 * groups * 16 * 4 < 3 * 2 * groups * 16 * 4
    emptied = sum({2 * block, 2 * block + 1} <= set(gone) for block in range(3))
    assert emptied == 1, "a block that loses both halves goes whole"
    assert claim.layers == 2 and claim.format == "edited" and claim.training_tokens == 0 and claim.sparsity is None
    with torch.no_grad():
        for number in gone:
            for parameter in written(blocks(whole)[number // 2], parts[number % 2][1]):
                parameter.zero_()
    with torch.inference_mode():
        assert torch.equal(model(CALIBRATION.ids).logits, whole(CALIBRATION.ids).logits), "zeros in its place are the same model"
        cached = model(CALIBRATION.ids[:, :20], use_cache=True)
        step = model(CALIBRATION.ids[:, 20:21], past_key_values=cached.past_key_values)
        torch.testing.assert_close(step.logits[:, 0], whole(CALIBRATION.ids[:, :21]).logits[:, -1], rtol=1e-4, atol=1e-4)
    assert len([layer for layer in cached.past_key_values.layers if layer.keys is not None]) == attentions


def test_a_sublayer_that_adds_nothing_is_the_first_to_go_and_is_not_missed(tmp_path: Path) -> None:
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    dense = tiny.saved(model, tmp_path / "model")
    claim = compressed(dense, tmp_path / "out", 1 / 3)
    assert (claim.details["attention_removed"], claim.details["mlp_removed"]) == (["model.layers.0"], ["model.layers.1"])
    assert claim.details["attention_change"][0] == claim.details["mlp_change"][1] == 0
    with torch.inference_mode():
        logits = [m(CALIBRATION.ids).logits for m in (dense.load(), edited.load(tmp_path / "out"))]
    assert torch.equal(*logits)


def test_one_attention_stays_and_equal_ones_go_in_order() -> None:
    found = {(f"layers.{index}", part): 1.0 for index in range(3) for part in ("attention", "mlp")}
    found["layers.1", "mlp"] = 0.5
    assert weakest(found, 2) == [("layers.0", "attention"), ("layers.1", "mlp")]  # type: ignore[arg-type]
    assert len(left := set(found) - set(weakest(found, 5))) == 1 and left == {("layers.2", "attention")}  # type: ignore[arg-type]
    assert [SublayerDropping(ratio=ratio).count(6) for ratio in (0.01, 0.25, 0.5, 0.8)] == [1, 2, 3, 5]


def test_a_model_without_some_sublayers_loses_others(tmp_path: Path) -> None:
    first = compressed(tiny.saved(uneven("llama"), tmp_path / "model"), tmp_path / "one", 0.5)
    second = compressed(tiny.dense_model(tmp_path / "one", "float32", format="edited"), tmp_path / "two", 0.34)
    assert len(second.details["attention_change"]) + len(second.details["mlp_change"]) == 3
    assert second.parameters and first.parameters and second.parameters < first.parameters
    with torch.inference_mode():
        assert torch.isfinite(edited.load(tmp_path / "two")(CALIBRATION.ids).logits).all()


@pytest.mark.parametrize(
    ("architecture", "more", "message"),
    [
        ("gpt2", {}, "GPT2Block is not built like Llama, OPT or Mixtral"),
        ("gemma2", {}, "the attentions of Gemma2ForCausalLM are of different kinds"),
        ("opt", {"do_layer_norm_before": False}, "OPTDecoderLayer is not built like Llama, OPT or Mixtral"),
    ],
)
def test_other_decoders_are_refused_in_one_line(architecture: str, more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=message) as caught:
        compressed(tiny.saved(make(architecture, **more), tmp_path / "source"), tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_settings_and_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    dense = tiny.save_model(tmp_path / "model")
    with pytest.raises(ValueError, match="ratio must be between 0 and 1"):
        SublayerDropping(ratio=1.0)
    with pytest.raises(Unsupported, match="4 sub-layers cannot be removed from 4, of which one attention stays"):
        SublayerDropping(ratio=0.9).check(dense.shape)
    with pytest.raises(ValueError, match="calibration holds no tokens"):
        SublayerDropping().compress(dense, Calibration.none(), tmp_path)


def test_the_same_artefact_comes_twice(tmp_path: Path) -> None:
    dense = tiny.saved(uneven("opt"), tmp_path / "model")
    first, second = (compressed(dense, tmp_path / name) for name in ("one", "two"))
    assert first == second
    for file in ("model.safetensors", "edited.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
