"""Pruning methods against the definitions of their papers, on tiny random models."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimbench.methods.base import DenseModel, Unsupported
from slimbench.methods.core.architecture.anatomy import anatomy
from slimbench.methods.core.architecture.rotation import untie
from slimbench.methods.core.statistics import block_influence
from slimbench.methods.formats import edited
from slimbench.methods.formats.architecture.structure import blocks_of
from slimbench.methods.pruning.depth.shortgpt import ShortGPT
from slimbench.methods.pruning.structured.llm_pruner import LLMPruner, importance, structures
from slimbench.methods.pruning.structured.slicegpt import SliceGPT, components
from tests.support import tiny
from tests.support.architectures import make

CALIBRATION = tiny.tokens(samples=6, length=48)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """Six blocks in float32 that differ in how much they do, with gains that are not one."""
    folder = tmp_path_factory.mktemp("deep")
    dense = tiny.save_model(folder, "float32", num_hidden_layers=6)
    model = dense.load()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data = 0.5 + torch.rand(parameter.shape, generator=generator)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data *= (1, 4, 2, 8, 0.5, 3)[int(name.split(".")[2])]
    model.save_pretrained(folder)
    return dense


def hidden_states(dense: DenseModel) -> list[Tensor]:
    """Inputs of the first block and outputs of each, float64 [samples, length, hidden]; the last without the final norm."""
    model = dense.load()
    model.model.norm = nn.Identity()
    with torch.inference_mode():
        return [h.double() for h in model(CALIBRATION.ids, output_hidden_states=True).hidden_states]


def test_block_influence_is_one_minus_the_mean_cosine(deep: DenseModel) -> None:
    states = hidden_states(deep)
    want = []
    for before, after in pairwise(states):
        cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        want.append(float(1 - cosine.mean()))
    assert len(want) == 6 and block_influence(deep.load(), CALIBRATION.ids) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(("method", "count"), [(ShortGPT(), 2), (ShortGPT(blocks=3), 3), (ShortGPT(fraction=0.01), 1)])
def test_shortgpt_is_the_model_without_its_weakest_blocks(deep: DenseModel, tmp_path: Path, method: ShortGPT, count: int) -> None:
    claim = method.compress(deep, CALIBRATION, tmp_path)
    influence = block_influence(deep.load(), CALIBRATION.ids)
    removed = claim.details["blocks_removed"]
    assert len(removed) == count and claim.sparsity is None
    assert max(influence[i] for i in removed) < min(influence[i] for i in range(6) if i not in removed)
    want = deep.load()
    want.model.layers = nn.ModuleList(block for i, block in enumerate(want.model.layers) if i not in removed)
    short = tiny.dense_model(tmp_path, "float32").load()
    with torch.inference_mode():
        want.config.num_hidden_layers = 6 - count
        assert torch.equal(short(CALIBRATION.ids).logits, want(CALIBRATION.ids, use_cache=False).logits)
    assert len(blocks_of(short)) == 6 - count and json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 6 - count
    assert claim.parameters == short.num_parameters() < claim.details["parameters_before"] == deep.load().num_parameters()
    saved = sum(p.numel() for p in deep.load().model.layers[0].parameters()) * 4 * count
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (deep.path, tmp_path)]
    assert sizes[0] - sizes[1] == pytest.approx(saved, rel=0.05)


def test_what_a_config_says_of_each_block_goes_with_it(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = tiny.SHAPE | {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    model = Qwen2ForCausalLM(Qwen2Config(**shape)).float()
    kinds = list(model.config.layer_types)
    assert len(set(kinds)) == 2
    (source := tmp_path / "source").mkdir()
    (out := tmp_path / "out").mkdir()
    model.save_pretrained(source)
    claim = ShortGPT(blocks=1).compress(tiny.dense_model(source, "float32"), CALIBRATION, out)
    (removed,) = claim.details["blocks_removed"]
    assert tiny.dense_model(out, "float32").load().config.layer_types == kinds[:removed] + kinds[removed + 1 :]


def test_shortgpt_leaves_a_block(deep: DenseModel) -> None:
    with pytest.raises(Unsupported, match="6 blocks cannot be removed from 6"):
        ShortGPT(blocks=6).check(deep.shape)
    with pytest.raises(ValueError, match="fraction must be"):
        ShortGPT(fraction=1.0)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, :-1].double()
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def test_importance_is_the_slope_of_the_loss_when_a_weight_shrinks(deep: DenseModel) -> None:
    model, ids = deep.load(), CALIBRATION.ids
    layer = model.model.layers[2].mlp.up_proj
    found = importance(model, [layer], ids, 1)[layer]
    for index in found.flatten().topk(3).indices.tolist():
        weight, sides = layer.weight.detach().view(-1), []
        kept = weight[index].item()
        for factor in (0.5, 1.5):
            weight[index] = factor * kept
            sides.append(float(loss(model, ids)))
        weight[index] = kept
        assert float(found.flatten()[index]) == pytest.approx(abs(sides[1] - sides[0]), rel=0.02)


def test_second_order_takes_half_the_mean_square_of_the_samples_away(deep: DenseModel) -> None:
    model, ids = deep.load(), CALIBRATION.ids[:3]
    layer = model.model.layers[1].self_attn.v_proj
    changes = []
    for sample in ids:
        layer.weight.requires_grad_(True)
        mean = model(sample[None], labels=sample[None], use_cache=False).loss
        changes.append(layer.weight.detach() * torch.autograd.grad(mean, layer.weight)[0])
    want = (torch.stack(changes).mean(0) - 0.5 * torch.stack(changes).square().mean(0)).abs()
    torch.testing.assert_close(importance(model, [layer], ids, 2)[layer], want, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("aggregate", ["sum", "max", "last"])
def test_llm_pruner_equals_masking_the_least_important_structures(deep: DenseModel, tmp_path: Path, aggregate: Any) -> None:
    method = LLMPruner(keep_first=0.2, keep_last=0.2, aggregate=aggregate, ratio=0.3)
    method.check(deep.shape)
    claim = method.compress(deep, CALIBRATION, tmp_path)
    masked = deep.load()
    spans = {"self_attn": (("q_proj", "k_proj", "v_proj"), "o_proj", 2, 1), "mlp": (("gate_proj", "up_proj"), "down_proj", 128, 38)}
    chosen = {}
    for index in range(1, 5):
        for owner, (makes, reads, count, removed) in spans.items():
            part = getattr(masked.model.layers[index], owner)
            layers = [getattr(part, name) for name in (*makes, reads)]
            found = importance(masked, layers, CALIBRATION.ids, 1)
            totals = [found[layer].unflatten(0, (count, -1)).sum((1, 2)) for layer in layers[:-1]]
            totals.append(found[layers[-1]].unflatten(1, (count, -1)).sum((0, 2)))
            score = {"sum": sum(totals), "max": torch.stack(totals).amax(0), "last": totals[-1]}[aggregate]
            chosen[layers[-1]] = (score.sort().indices[:removed], count)
    with torch.no_grad():
        for layer, (gone, count) in chosen.items():
            layer.weight.unflatten(1, (count, -1))[:, gone] = 0
    pruned = edited.load(tmp_path)
    with torch.inference_mode():
        torch.testing.assert_close(pruned(CALIBRATION.ids).logits, masked(CALIBRATION.ids).logits, rtol=1e-4, atol=1e-4)
    assert claim.details["blocks_pruned"] == [1, 4] and claim.details["channels_left"] == [90, 128] and claim.sparsity is None
    assert claim.parameters == sum(p.numel() for p in pruned.parameters()) < claim.details["parameters_before"]
    assert [block.mlp.up_proj.out_features for block in pruned.model.layers] == [128, 90, 90, 90, 90, 128]
    assert (tmp_path / "model.safetensors").stat().st_size < 0.85 * (deep.path / "model.safetensors").stat().st_size


def test_llm_pruner_keeps_the_first_and_the_last_blocks_and_one_of_each_structure() -> None:
    assert LLMPruner().pruned(32) == range(4, 30) and LLMPruner().pruned(30) == range(4, 28)
    assert LLMPruner(ratio=0.99).kept(torch.tensor([3.0, 1.0, 5.0])).tolist() == [2]
    assert LLMPruner().kept(torch.tensor([3.0, 1.0, 5.0, 4.0])).tolist() == [0, 2, 3]
    with pytest.raises(ValueError, match="ratio must be"):
        LLMPruner(ratio=1.0)
    with pytest.raises(ValueError, match="shares that leave blocks"):
        LLMPruner(keep_first=0.6, keep_last=0.4)


def test_pruned_heads_go_with_their_cache(deep: DenseModel, tmp_path: Path) -> None:
    LLMPruner().compress(deep, CALIBRATION, tmp_path)
    model, ids = edited.load(tmp_path), CALIBRATION.ids[:2]
    with torch.inference_mode():
        cache = model(ids[:, :30], use_cache=True).past_key_values
        stepped = model(ids[:, 30:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(stepped, model(ids, use_cache=False).logits[:, 30:], rtol=1e-4, atol=1e-4)


def test_llm_pruner_cuts_opt_with_its_biases(tmp_path: Path) -> None:
    """The artefact equals the whole model in which nothing reads the structures that are gone."""
    dense, ids = tiny.saved(make("opt"), tmp_path / "source"), CALIBRATION.ids
    (out := tmp_path / "out").mkdir()
    method = LLMPruner(keep_first=0.3, keep_last=0, ratio=0.3)
    claim = method.compress(dense, CALIBRATION, out)
    pruned, masked, whole = edited.load(out), dense.load(), dense.load()
    kinds: tuple[tuple[tuple[str, ...], str, int, int], ...] = (
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.out_proj", 4, 1),
        (("fc1",), "fc2", 128, 38),
    )
    for index in (1, 2):
        name = f"model.decoder.layers.{index}"
        for makes, reads, count, removed in kinds:
            layers = [whole.get_submodule(f"{name}.{layer}") for layer in (*makes, reads)]
            found = importance(whole, layers, ids, 1)
            score = sum(found[layer].unflatten(0, (count, -1)).sum((1, 2)) for layer in layers[:-1])
            score = score + found[layers[-1]].unflatten(1, (count, -1)).sum((0, 2))
            gone, left = score.sort().indices[:removed], score.sort().indices[removed:].sort().values
            masked.get_submodule(f"{name}.{reads}").weight.data.unflatten(1, (count, -1))[:, gone] = 0
            for layer in makes:
                bias = whole.get_submodule(f"{name}.{layer}").bias.unflatten(0, (count, -1))[left].flatten()
                assert torch.equal(pruned.get_submodule(f"{name}.{layer}").bias, bias)
    with torch.inference_mode():
        got, want, before = (model(ids).logits for model in (pruned, masked, whole))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(want, before, atol=1e-2)
    group, channel = 16 * (3 * 65 + 64), 2 * 64 + 1
    assert claim.parameters == sum(p.numel() for p in pruned.parameters()) == whole.num_parameters() - 2 * (group + 38 * channel)
    assert claim.layers == 3 and claim.cache_bytes_per_token == (64 + 2 * 48) * 2 * 4
    assert claim.details["head_groups_left"] == [3, 4] and claim.details["channels_left"] == [90, 128]
    assert {p.name for p in out.iterdir()} >= {"edited.json", "config.json", "model.safetensors"}


@pytest.mark.parametrize("architecture", ["llama", "gemma", "opt"])
def test_a_second_cut_goes_by_the_heads_that_are_left(architecture: str, tmp_path: Path) -> None:
    dense = tiny.saved(make(architecture, num_attention_heads=8), tmp_path / "source")
    method, groups = LLMPruner(keep_first=0, keep_last=0, ratio=0.5), []
    for step in ("one", "two"):
        (out := tmp_path / step).mkdir()
        method.compress(dense, CALIBRATION, out)
        dense = tiny.dense_model(out, "float32", format="edited")
        model = edited.load(out)
        groups.append([block.attention.groups for block in anatomy(model)])
        with torch.inference_mode():
            assert bool(torch.isfinite(model(CALIBRATION.ids).logits).all())
    assert groups == ([[4] * 3, [2] * 3] if architecture == "opt" else [[1] * 3, [1] * 3])


@pytest.mark.parametrize(
    ("method", "architecture", "message"),
    [
        (LLMPruner(), "gpt2", "GPT2Block is not built like Llama, OPT or Mixtral"),
        (LLMPruner(), "mixtral", "MixtralDecoderLayer has 4 experts in one tensor in the place of an MLP"),
        (SliceGPT(), "opt", "OPTForCausalLM has no norm before its head"),
        (SliceGPT(), "mixtral", "MixtralDecoderLayer has 4 experts in one tensor"),
    ],
)
def test_other_decoders_are_refused(method: Any, architecture: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=message):
        method.compress(tiny.saved(make(architecture), tmp_path / "source"), CALIBRATION, tmp_path)


def test_heads_that_share_a_norm_are_not_cut() -> None:
    model = make("llama")
    model.model.layers[0].self_attn.q_norm = nn.RMSNorm(64)
    with pytest.raises(Unsupported, match="a norm over all heads together"):
        structures(anatomy(model)[0])


@pytest.mark.parametrize("tied", [True, False])
def test_turning_without_cutting_changes_no_logit(tmp_path: Path, deep: DenseModel, tied: bool) -> None:
    model = deep.load()
    if not tied:
        untie(model)
    (source := tmp_path / "source").mkdir()
    (out := tmp_path / "out").mkdir()
    model.save_pretrained(source)
    claim = SliceGPT(slicing=0).compress(tiny.dense_model(source, "float32"), CALIBRATION, out)
    sliced, ids = edited.load(out), tiny.tokens(3, 40, seed=5).ids
    with torch.inference_mode():
        torch.testing.assert_close(sliced(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
    assert claim.details["hidden_size_left"] == [64, 64] and claim.details["least_signal_kept"] == pytest.approx(1)
    assert claim.parameters == sum(p.numel() for p in sliced.parameters())
    turned = sliced.model.layers[3].mlp_shortcut.weight.double()
    assert (turned @ turned.T - torch.eye(64)).abs().max() < 1e-5 and (turned - torch.eye(64)).abs().max() > 0.1


def test_components_are_the_best_of_their_rank() -> None:
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(4, 30, 16, generator=generator) * torch.linspace(0.1, 3, 16) + 0.5
    basis, share = components(states.split(1), 5)
    rows = states.flatten(0, 1).double()
    lost = float((rows - rows @ basis @ basis.T).square().sum())
    singular = torch.linalg.svdvals(rows)
    assert (basis.T @ basis - torch.eye(5)).abs().max() < 1e-10
    assert lost == pytest.approx(float(singular[5:].square().sum())) and share == pytest.approx(1 - lost / float(rows.square().sum()))


def test_slicing_keeps_of_each_signal_what_its_components_span(deep: DenseModel, tmp_path: Path) -> None:
    """The sliced embedding and the first sub-block, by the paper's formulas, on the dense model's own tensors."""
    claim = SliceGPT(slicing=0.25).compress(deep, CALIBRATION, tmp_path)
    model, sliced, ids = deep.load().double(), edited.load(tmp_path), CALIBRATION.ids
    with torch.inference_mode():
        embedded = model.model.embed_tokens(ids)
        basis, _ = components([embedded], 48)
        projected = embedded @ basis @ basis.T
        got = sliced.model.embed_tokens(ids).double()
        torch.testing.assert_close(got @ got.mT, projected @ projected.mT, rtol=1e-4, atol=1e-6)
        block = model.model.layers[0]
        scale = embedded.shape[-1] ** 0.5 / projected.norm(dim=-1, keepdim=True)
        positions = model.model.rotary_emb(projected, torch.arange(ids.shape[1])[None])
        attended, _ = block.self_attn(projected * scale * block.input_layernorm.weight, position_embeddings=positions, attention_mask=None)
        between = projected + attended
        basis, _ = components([between], 48)
        kept = between @ basis @ basis.T
        seen: list[Tensor] = []
        sliced.model.layers[0].post_attention_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
        sliced(ids)
    torch.testing.assert_close(seen[0] @ seen[0].mT, kept @ kept.mT, rtol=1e-3, atol=1e-3)
    assert claim.details["hidden_size_left"] == [48, 64] and 0.5 < claim.details["least_signal_kept"] < 1
    assert claim.sparsity is None and claim.parameters == sum(p.numel() for p in sliced.parameters())
    assert sliced.model.layers[0].self_attn.q_proj.in_features == 48 and sliced.lm_head.in_features == 48


def test_principal_components_lose_less_than_random_ones(deep: DenseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def random(states: Any, size: int) -> tuple[Tensor, float]:
        width = next(iter(states)).shape[-1]
        return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0][:, :size], 1.0

    with torch.inference_mode():
        want = deep.load()(CALIBRATION.ids).logits
    errors = []
    for name in ("principal", "random"):
        (out := tmp_path / name).mkdir()
        if name == "random":
            monkeypatch.setattr("slimbench.methods.pruning.structured.slicegpt.components", random)
        SliceGPT(slicing=0.25).compress(deep, CALIBRATION, out)
        with torch.inference_mode():
            errors.append(float((edited.load(out)(CALIBRATION.ids).logits - want).norm()))
    assert errors[0] < 0.7 * errors[1]


def test_slicegpt_rounds_the_size_down_and_refuses_to_leave_nothing(deep: DenseModel) -> None:
    assert [SliceGPT(slicing=s).left(576) for s in (0, 0.2, 0.25, 0.3)] == [576, 456, 432, 400]
    with pytest.raises(Unsupported, match="nothing is left of a hidden size of 64"):
        SliceGPT(slicing=0.9).check(deep.shape)
    with pytest.raises(ValueError, match="slicing must be"):
        SliceGPT(slicing=1.0)


def test_blocks_that_scale_their_residuals_are_refused(tmp_path: Path) -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    (source := tmp_path / "source").mkdir()
    GraniteForCausalLM(GraniteConfig(**tiny.SHAPE, residual_multiplier=0.2)).float().save_pretrained(source)
    with pytest.raises(Unsupported, match="does more on its residual connections"):
        SliceGPT().compress(tiny.dense_model(source, "float32"), CALIBRATION, tmp_path)


def test_an_edited_artefact_that_does_not_fit_is_refused(deep: DenseModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    LLMPruner().compress(deep, CALIBRATION, tmp_path)
    weights, described = tmp_path / "model.safetensors", tmp_path / "edited.json"
    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}, weights)
    with pytest.raises(ValueError, match=r"missing \['model.norm.weight'\]"):
        edited.load(tmp_path)
    described.write_text(described.read_text().replace('"schema": 1', '"schema": 99'))
    with pytest.raises(ValueError, match="newer than 1"):
        edited.load(tmp_path)
