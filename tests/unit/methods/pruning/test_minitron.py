"""Minitron against the equations of its paper, on tiny random models, and the ordinary checkpoints that it leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from slimbench.methods.base import DenseModel, Unsupported
from slimbench.methods.core.architecture import uniform
from slimbench.methods.core.architecture.anatomy import anatomy
from slimbench.methods.core.architecture.uniform import Kept, Sizes, narrow
from slimbench.methods.core.statistics import block_influence
from slimbench.methods.pruning.structured.minitron import Minitron, activations, losses_without
from tests.support import tiny
from tests.support.architectures import make

CALIBRATION = tiny.tokens(samples=6, length=48)
NARROW = Minitron(ratio=0.66, multiple=16)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """Four blocks in float32 whose features, heads and channels are of different strength."""
    folder = tmp_path_factory.mktemp("dense")
    model = make("llama", num_hidden_layers=4)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("v_proj.weight", "up_proj.weight", "norm.weight")):
                rows = torch.rand(len(parameter), generator=generator) * 2 + 0.2
                parameter.mul_(rows.view(-1, *[1] * (parameter.dim() - 1)))
            if name.endswith(("down_proj.weight", "o_proj.weight")):
                parameter.mul_((0.3, 2.0, 0.1, 1.0)[int(name.split(".")[2])])
    model.save_pretrained(folder)
    return tiny.dense_model(folder, "float32")


def seen(model: Any, ids: Tensor) -> dict[str, list[Tensor]]:
    """Outputs of norms and inputs of other layers by name, float64 [length, width] of one sample after the other."""
    found: dict[str, list[Tensor]] = {}

    def look(name: str, tensor: Tensor) -> None:
        found.setdefault(name, []).append(tensor.double().reshape(ids.shape[1], -1))

    hooks = []
    for name, module in model.named_modules():
        if "norm" in name:
            hooks.append(module.register_forward_hook(lambda _, __, made, name=name: look(name, made)))
        elif isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(lambda _, args, name=name: look(name, args[0])))
    with torch.no_grad():
        for sample in ids:
            model(sample[None])
    for hook in hooks:
        hook.remove()
    return found


def strength(samples: list[Tensor]) -> Tensor:
    """Paper, section 2.2, the best practice (batch=L2, seq=mean): √Σ_samples (mean over tokens of the magnitude)²."""
    total = []
    for feature in range(samples[0].shape[1]):
        means = [sum(abs(value) for value in sample[:, feature].tolist()) / len(sample) for sample in samples]
        total.append(sum(mean**2 for mean in means) ** 0.5)
    return torch.tensor(total, dtype=torch.float64)


def paper(model: Any, ids: Tensor, names: tuple[Any, ...]) -> tuple[Tensor, Any, Any]:
    """F_emb, summed over the norms of all blocks, F_head, summed over groups, and F_neuron of each block."""
    norms, out, down, width, groups = names
    found, hidden, heads, channels = seen(model, ids), torch.zeros(model.config.hidden_size, dtype=torch.float64), [], []
    for name in [name.removesuffix(f".{down}") for name in found if name.endswith(f".{down}")]:
        for norm in norms:
            hidden = hidden + strength(found[f"{name}.{norm}"])
        lengths = [x.unflatten(1, (-1, width)).square().sum(-1).sqrt() for x in found[f"{name}.{out}"]]
        heads.append(strength(lengths).view(groups, -1).sum(1))
        channels.append(strength(found[f"{name}.{down}"]))
    return hidden, heads, channels


LLAMA = (("input_layernorm", "post_attention_layernorm"), "self_attn.o_proj", "mlp.down_proj", 16, 2)
OPT = (("self_attn_layer_norm", "final_layer_norm"), "self_attn.out_proj", "fc2", 16, 4)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_importance_is_that_of_the_paper(dense: DenseModel, architecture: str) -> None:
    model = dense.load() if architecture == "llama" else make("opt")
    ids = CALIBRATION.ids[:, :20]
    hidden, heads, channels = paper(model, ids, LLAMA if architecture == "llama" else OPT)
    found = activations(model, ids)
    torch.testing.assert_close(found.hidden, hidden, rtol=1e-5, atol=0)
    assert len(found.groups) == len(heads) == len(found.channels)
    for got, want in zip([*found.groups, *found.channels], [*heads, *channels], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_loss_without_a_block_is_that_of_the_model_without_it(dense: DenseModel) -> None:
    want = []
    for index in range(4):
        model = dense.load()
        model.model.layers = nn.ModuleList(block for i, block in enumerate(model.model.layers) if i != index)
        with torch.no_grad():
            logits = model(CALIBRATION.ids, use_cache=False).logits[:, :-1].double()
        want.append(float(nn.functional.cross_entropy(logits.flatten(0, 1), CALIBRATION.ids[:, 1:].flatten())))
    assert losses_without(dense.load(), CALIBRATION.ids) == pytest.approx(want, rel=1e-6) and len(set(want)) == 4


def strongest(scores: Tensor, count: int) -> Tensor:
    return scores.topk(count).indices.sort().values


class Masked(nn.Module):
    """A norm of which only some features are there: it takes its mean over them, and all others are 0."""

    def __init__(self, norm: Any, kept: Tensor) -> None:
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, x: Tensor) -> Tensor:
        here, weight, made = x[..., self.kept], self.norm.weight[self.kept], torch.zeros_like(x)
        if isinstance(self.norm, nn.LayerNorm):
            made[..., self.kept] = nn.functional.layer_norm(here, (len(self.kept),), weight, self.norm.bias[self.kept], self.norm.eps)
        else:
            made[..., self.kept] = here * (here.square().mean(-1, keepdim=True) + self.norm.variance_epsilon).rsqrt() * weight
        return made


@torch.no_grad()
def mask(model: Any, hidden: Tensor, heads: Any, channels: Any, names: tuple[Any, ...]) -> Any:
    """The whole model with zeros in the place of all that goes; its blocks are those of `model`."""
    _, out, down, _, groups = names
    gone = torch.ones(model.config.hidden_size, dtype=torch.bool)
    gone[hidden] = False
    stack: Any = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    for block, groups_kept, channels_kept in zip(stack, heads, channels, strict=True):
        for name, kept, runs in (
            (out, groups_kept, groups),
            (down, channels_kept, model.config.to_dict().get("intermediate_size") or model.config.ffn_dim),
        ):
            layer: Any = block.get_submodule(name)
            missing = [run for run in range(runs) if run not in kept.tolist()]
            layer.weight.unflatten(1, (runs, -1))[:, missing] = 0
            layer.weight[gone] = 0
            if layer.bias is not None:
                layer.bias[gone] = 0
    model.get_input_embeddings().weight[:, gone] = 0
    for name, module in list(model.named_modules()):
        if name.endswith(("layernorm", "layer_norm", "model.norm")):
            model.set_submodule(name, Masked(module, hidden))
        if name.endswith("embed_positions"):
            module.weight[:, gone] = 0
    return model


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(CALIBRATION.ids, use_cache=False).logits


def closed_form(sizes: Sizes) -> int:
    """Of the tiny Llama with tied embeddings: 6 · 16 weights of a group for each hidden feature, three of a channel, two norms."""
    return sizes.hidden * (256 + 1) + sizes.blocks * sizes.hidden * (96 * sizes.groups + 3 * sizes.channels + 2)


def test_the_narrow_model_is_the_masked_one(dense: DenseModel, tmp_path: Path) -> None:
    claim = NARROW.compress(dense, CALIBRATION, tmp_path)
    assert claim.format == "huggingface" and not (tmp_path / "edited.json").exists()
    hidden, heads, channels = paper(dense.load(), CALIBRATION.ids, LLAMA)
    kept = ([strongest(scores, 1) for scores in heads], [strongest(scores, 80) for scores in channels])
    masked = mask(dense.load(), strongest(hidden, 32), *kept, LLAMA)
    cut = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (logits(cut) - logits(masked)).abs().max() <= 1e-4 and (logits(masked) - logits(dense.load())).abs().max() > 0.1
    assert torch.equal(cut.model.embed_tokens.weight, dense.load().model.embed_tokens.weight[:, strongest(hidden, 32)])
    config = json.loads((tmp_path / "config.json").read_text())
    named = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers")
    assert [config[name] for name in named] == [32, 80, 2, 1, 16, 4] and cut.lm_head.weight is cut.model.embed_tokens.weight
    assert claim.parameters == cut.num_parameters() == closed_form(Sizes(4, 32, 1, 80)) <= 0.34 * claim.details["parameters_before"]
    assert claim.layers == 4 and claim.cache_bytes_per_token == 4 * 2 * 16 * 4 and claim.details["blocks_removed"] == []
    assert claim.details["sizes_left"] == {"blocks": 4, "hidden": 32, "groups": 1, "channels": 80}


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4, 0.5, 0.7])
@pytest.mark.parametrize("multiple", [8, 16])
def test_sizes_are_the_most_even_that_fit(dense: DenseModel, ratio: float, multiple: int) -> None:
    full = Sizes(4, 64, 2, 128)
    fitting = []
    for hidden, groups, channels in product(range(multiple, 65, multiple), (1, 2), range(multiple, 129, multiple)):
        sizes = Sizes(4, hidden, groups, channels)
        if hidden % (2 * groups) == 0 and closed_form(sizes) <= (1 - ratio) * closed_form(full):
            fitting.append((sorted((hidden / 64, groups / 2, channels / 128)), closed_form(sizes), (hidden, groups, channels)))
    got = Minitron(ratio=ratio, multiple=multiple).sizes(dense.load())
    assert (got.hidden, got.groups, got.channels) == max(fitting)[2] and got.blocks == 4


@pytest.mark.parametrize(
    ("method", "sizes", "count"),
    [
        (Minitron(), Sizes(30, 480, 2, 1440), 100_575_840),
        (Minitron(depth=1.0), Sizes(20, 576, 3, 1536), 134_515_008 - 10 * 3_540_096),
        (Minitron(depth=0.5), Sizes(25, 576, 3, 1152), 100_225_728),
    ],
)
def test_a_quarter_of_a_model_of_135_million_parameters_goes(method: Minitron, sizes: Sizes, count: int) -> None:
    """Nine heads want a hidden size that is a multiple of nine, which no multiple of 32 below 576 but 288 is."""
    shape: dict[str, Any] = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    config = LlamaConfig(**shape, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    grown = uniform.growth(model)
    full = uniform.sizes_of(model)
    assert uniform.parameters(grown, full) == model.num_parameters() == 134_515_008
    assert uniform.parameters(grown, full) - uniform.parameters(grown, replace(full, blocks=29)) == 3_540_096
    assert uniform.parameters(grown, full) - uniform.parameters(grown, replace(full, channels=1535)) == 30 * 1_728
    assert uniform.parameters(grown, full) - uniform.parameters(grown, replace(full, groups=2)) == 30 * 294_912
    assert method.sizes(model) == sizes and uniform.parameters(grown, sizes) == count <= 100_886_256


@pytest.mark.parametrize("measure", ["influence", "loss"])
def test_the_shallow_model_is_the_one_without_the_weakest_blocks(dense: DenseModel, tmp_path: Path, measure: Any) -> None:
    claim = Minitron(ratio=0.3, depth=1.0, blocks_by=measure).compress(dense, CALIBRATION, tmp_path)
    scores = block_influence(dense.load(), CALIBRATION.ids) if measure == "influence" else losses_without(dense.load(), CALIBRATION.ids)
    weakest = sorted(sorted(range(4), key=scores.__getitem__)[:2])
    want = dense.load()
    want.model.layers = nn.ModuleList(block for i, block in enumerate(want.model.layers) if i not in weakest)
    cut = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(cut), logits(want)) and claim.details["blocks_removed"] == weakest and claim.layers == 2
    assert claim.parameters == cut.num_parameters() == closed_form(Sizes(2, 64, 2, 128))
    assert claim.cache_bytes_per_token == 2 * 2 * 32 * 4


def test_the_mixed_model_loses_blocks_and_width(dense: DenseModel, tmp_path: Path) -> None:
    claim = Minitron(ratio=0.66, depth=0.3, multiple=16).compress(dense, CALIBRATION, tmp_path)
    (removed,) = claim.details["blocks_removed"]
    influence = block_influence(dense.load(), CALIBRATION.ids)
    assert removed == influence.index(min(influence)) < 3
    hidden, heads, channels = paper(dense.load(), CALIBRATION.ids, LLAMA)
    left = Sizes(**claim.details["sizes_left"])
    masked = dense.load()
    masked.model.layers = nn.ModuleList(block for i, block in enumerate(masked.model.layers) if i != removed)
    stay = [i for i in range(4) if i != removed]
    kept = ([strongest(heads[i], left.groups) for i in stay], [strongest(channels[i], left.channels) for i in stay])
    mask(masked, strongest(hidden, left.hidden), *kept, LLAMA)
    cut = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (logits(cut) - logits(masked)).abs().max() <= 1e-4
    assert left == Sizes(3, 32, 2, 96) and claim.layers == 3
    assert claim.parameters == cut.num_parameters() == closed_form(left) <= 0.34 * closed_form(Sizes(4, 64, 2, 128))


def test_opt_is_cut_with_its_biases_and_positions_where_heads_and_hidden_size_agree(tmp_path: Path) -> None:
    dense = tiny.saved(make("opt"), tmp_path / "source")
    (out := tmp_path / "out").mkdir()
    claim = Minitron(ratio=0.5, multiple=16).compress(dense, CALIBRATION, out)
    left = Sizes(**claim.details["sizes_left"])
    assert left.hidden == 16 * left.groups < 64, "its heads are as wide as its hidden states"
    hidden, heads, channels = paper(dense.load(), CALIBRATION.ids, OPT)
    kept = ([strongest(scores, left.groups) for scores in heads], [strongest(scores, left.channels) for scores in channels])
    masked = mask(dense.load(), strongest(hidden, left.hidden), *kept, OPT)
    cut = AutoModelForCausalLM.from_pretrained(out)
    assert (logits(cut) - logits(masked)).abs().max() <= 1e-4
    assert claim.parameters == cut.num_parameters() <= 0.5 * claim.details["parameters_before"]
    config = json.loads((out / "config.json").read_text())
    assert (config["hidden_size"], config["word_embed_proj_dim"], config["ffn_dim"]) == (left.hidden, left.hidden, left.channels)


@pytest.mark.parametrize(
    ("architecture", "more", "sizes"),
    [
        ("llama", {"tie_word_embeddings": False}, Sizes(3, 48, 1, 96)),
        ("llama", {"attention_bias": True, "mlp_bias": True}, Sizes(3, 40, 2, 112)),
        ("qwen2", {"num_key_value_heads": 2}, Sizes(3, 40, 1, 96)),
        ("qwen3", {}, Sizes(3, 56, 1, 80)),
        ("gemma", {}, Sizes(3, 64, 1, 80)),
    ],
)
def test_what_is_narrow_in_memory_is_narrow_on_disk(architecture: str, more: Any, sizes: Sizes, tmp_path: Path) -> None:
    model = make(architecture, **more)
    grown = uniform.growth(model)
    assert uniform.parameters(grown, uniform.sizes_of(model)) == model.num_parameters()
    generator = torch.Generator().manual_seed(0)

    def some(full: int, count: int) -> Tensor:
        return torch.randperm(full, generator=generator)[:count].sort().values

    narrow(model, Kept(some(64, sizes.hidden), [some(2, sizes.groups)] * 3, [some(128, sizes.channels)] * 3))
    tiny.saved(model, tmp_path / "out")
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(cut), logits(model), rtol=1e-5, atol=1e-5)
    assert uniform.parameters(grown, sizes) == cut.num_parameters() == sum(p.numel() for p in model.parameters())
    assert uniform.sizes_of(cut) == uniform.sizes_of(model) == sizes
    assert {block.attention.head_dim for block in anatomy(cut)} == {model.model.layers[0].self_attn.head_dim}


@pytest.mark.parametrize(
    ("architecture", "sizes", "message"),
    [
        ("llama", Sizes(3, 50, 2, 128), "cannot have 4 heads, hidden size 50, 128 channels: .*not a multiple of the number of attention"),
        ("opt", Sizes(3, 64, 3, 128), "OPTForCausalLM cannot have 3 heads, hidden size 64"),
        ("opt", Sizes(3, 48, 4, 128), "an ordinary OPTForCausalLM cannot have 4 heads, hidden size 48, 128 channels: its config makes"),
        ("gemma", Sizes(3, 48, 2, 128), "GemmaForCausalLM scales its embeddings by a hidden size that cannot be 48"),
    ],
)
def test_sizes_that_no_config_can_say_are_refused(architecture: str, sizes: Sizes, message: str) -> None:
    with pytest.raises(Unsupported, match=message) as refusal:
        uniform.check(make(architecture), sizes)
    assert "\n" not in str(refusal.value)


def test_blocks_of_different_sizes_have_none_in_common() -> None:
    model = make("llama")
    model.model.layers[1].mlp.down_proj = nn.Linear(100, 64, bias=False)
    with pytest.raises(Unsupported, match="have 2 different sizes"):
        uniform.sizes_of(model)


@pytest.mark.parametrize(
    ("method", "architecture", "message"),
    [
        (Minitron(), "gpt2", "GPT2Block is not built like Llama, OPT or Mixtral"),
        (Minitron(depth=1.0), "mixtral", "MixtralDecoderLayer has 4 experts in one tensor"),
        (Minitron(ratio=0.99), "llama", "no hidden size and channels in multiples of 32 leave"),
        (Minitron(ratio=0.99, depth=1.0), "llama", "fewer than 1 of 3 blocks would be left"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_measured(method: Any, architecture: str, message: str, tmp_path: Path) -> None:
    dense = replace(tiny.saved(make(architecture), tmp_path / "source"), progress=lambda done, total: pytest.fail("it was measured"))
    with pytest.raises(Unsupported, match=message) as refusal:
        method.compress(dense, CALIBRATION, tmp_path)
    assert "\n" not in str(refusal.value) and not (tmp_path / "model.safetensors").exists()


def test_settings_have_ranges(dense: DenseModel) -> None:
    for settings, message in (({"ratio": 1.0}, "ratio must be"), ({"depth": 1.1}, "depth must be"), ({"multiple": 0}, "multiple must be")):
        with pytest.raises(ValueError, match=message):
            Minitron(**settings)
    with pytest.raises(Unsupported, match="no block can be removed from 1"):
        Minitron(depth=0.5).check(replace(dense.shape, num_layers=1))


def test_the_same_comes_out_twice_and_progress_rises_to_the_end(dense: DenseModel, tmp_path: Path) -> None:
    told: list[float] = []
    watched = replace(dense, progress=lambda done, total: told.append(done / total))
    method = Minitron(ratio=0.5, depth=0.4, multiple=16)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        method.compress(watched if name == "one" else dense, CALIBRATION, tmp_path / name)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert told == [0.5, 1.0], "one batch of each pass"
