"""Rankings of heads and channels against their definitions, on tiny random models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from slimbench.methods.base import Calibration, DenseModel, Unsupported
from slimbench.methods.core.architecture.anatomy import anatomy
from slimbench.methods.core.architecture.units import best, structures
from slimbench.methods.formats import edited
from slimbench.methods.pruning.structured import llm_pruner
from slimbench.methods.pruning.structured.group_norm import GroupNorm
from slimbench.methods.pruning.structured.head_importance import HeadImportance, importance, of_groups, weakest
from tests.support import tiny
from tests.support.architectures import make

CALIBRATION = tiny.tokens(samples=5, length=24)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """Three blocks of eight query heads in four groups."""
    model = make("llama", num_attention_heads=8, num_key_value_heads=4)
    return tiny.saved(model, tmp_path_factory.mktemp("units") / "source")


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(CALIBRATION.ids, use_cache=False).logits


def norms(makes: list[Tensor], reads: Tensor, count: int, power: int) -> list[float]:
    """(Σ |w|^p)^(1/p) over the rows [out, in] and columns that a unit has, weight by weight."""
    found = []
    for unit in range(count):
        total = 0.0
        for weight in makes:
            rows = len(weight) // count
            total += sum(abs(w) ** power for row in weight[unit * rows : (unit + 1) * rows].tolist() for w in row)
        columns = reads.shape[1] // count
        total += sum(abs(w) ** power for row in reads[:, unit * columns : (unit + 1) * columns].tolist() for w in row)
        found.append(total ** (1 / power))
    return found


@pytest.mark.parametrize("norm", [1, 2])
def test_group_norm_leaves_the_heaviest_units_of_each_block(dense: DenseModel, tmp_path: Path, norm: Any) -> None:
    claim = GroupNorm(norm=norm, ratio=0.5).compress(dense, Calibration.none(), tmp_path)
    whole, cut = dense.load(), AutoModelForCausalLM.from_pretrained(tmp_path)
    masked = dense.load()
    for index, block in enumerate(whole.model.layers):
        attention, mlp = block.self_attn, block.mlp
        heads = norms([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight], attention.o_proj.weight, 4, norm)
        channels = norms([mlp.gate_proj.weight, mlp.up_proj.weight], mlp.down_proj.weight, 128, norm)
        gone = sorted(range(4), key=heads.__getitem__)[:2], sorted(range(128), key=channels.__getitem__)[:64]
        left = [unit for unit in range(128) if unit not in gone[1]]
        assert torch.equal(cut.model.layers[index].mlp.up_proj.weight, mlp.up_proj.weight[left])
        with torch.no_grad():
            masked.model.layers[index].self_attn.o_proj.weight.unflatten(1, (4, -1))[:, gone[0]] = 0
            masked.model.layers[index].mlp.down_proj.weight[:, gone[1]] = 0
    assert (logits(cut) - logits(masked)).abs().max() <= 1e-4 < (logits(masked) - logits(whole)).abs().max()
    config = json.loads((tmp_path / "config.json").read_text())
    named = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    assert [config[name] for name in named] == [64, 64, 4, 2, 8] and not (tmp_path / "edited.json").exists()
    group, channel = 64 * 8 * (2 + 1 + 1 + 2), 3 * 64
    assert claim.parameters == cut.num_parameters() == whole.num_parameters() - 3 * (2 * group + 64 * channel)
    assert claim.layers == 3 and claim.cache_bytes_per_token == 3 * 2 * 16 * 4 and claim.format == "huggingface"


def test_the_two_norms_can_disagree() -> None:
    """One large weight outweighs many small ones in the squares, not in the magnitudes."""
    makes, reads = [torch.tensor([[3.0, 0.0], [2.0, 2.0]])], torch.zeros(2, 2)
    two, one = (norms(makes, reads, 2, power) for power in (2, 1))
    assert two[0] > two[1] and one[0] < one[1]


def test_units_of_equal_weights_go_in_exact_numbers(tmp_path: Path) -> None:
    model = make("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.fill_(0.5)
                if ".0.mlp.up_proj" in name:
                    parameter.copy_(torch.where(torch.arange(128)[:, None] % 2 == 0, 0.5, -0.5))
    dense = tiny.saved(model, tmp_path / "source")
    (out := tmp_path / "out").mkdir()
    claim = GroupNorm().compress(dense, Calibration.none(), out)
    assert claim.details["sizes_left"] == {"blocks": 3, "hidden": 64, "groups": 1, "channels": 96}
    kept = AutoModelForCausalLM.from_pretrained(out).model.layers[0].mlp.up_proj.weight
    assert torch.equal(kept, dense.load().model.layers[0].mlp.up_proj.weight[32:]), "of equal ones the earlier go"
    assert best(torch.ones(5), 2).tolist() == [3, 4] and best(torch.tensor([3.0, 1, 2]), 2).tolist() == [0, 2]


def test_opt_loses_channels_but_no_head_to_its_group_norms(tmp_path: Path) -> None:
    """In an ordinary OPT all heads together are as wide as the hidden states."""
    dense = tiny.saved(make("opt"), tmp_path / "source")
    (out := tmp_path / "out").mkdir()
    with pytest.raises(Unsupported, match="OPTForCausalLM cannot have 3 heads, hidden size 64") as refusal:
        GroupNorm().compress(dense, Calibration.none(), out)
    assert "\n" not in str(refusal.value) and not list(out.iterdir())
    claim = GroupNorm(ratio=0.1).compress(dense, Calibration.none(), out)
    masked, cut = dense.load(), AutoModelForCausalLM.from_pretrained(out)
    for block in masked.model.decoder.layers:
        scores = norms([block.fc1.weight], block.fc2.weight, 128, 2)
        with torch.no_grad():
            block.fc2.weight[:, sorted(range(128), key=scores.__getitem__)[:13]] = 0
    assert (logits(cut) - logits(masked)).abs().max() <= 1e-4
    assert claim.parameters == cut.num_parameters() == masked.num_parameters() - 3 * 13 * (2 * 64 + 1)


def loss_of(model: Any, sample: Tensor) -> float:
    with torch.no_grad():
        logits = model(sample[None], use_cache=False).logits[0, :-1].double()
    return float(nn.functional.cross_entropy(logits, sample[1:]))


def slopes(model: Any, layer: nn.Linear, heads: int, ids: Tensor, step: float = 1e-2) -> Tensor:
    """∂L(x)/∂ξ_h of each sample by the difference of two losses, with the outputs of the head scaled: [samples, heads]."""
    found = torch.zeros(len(ids), heads, dtype=torch.float64)
    weight = layer.weight.data.unflatten(1, (heads, -1))
    for head in range(heads):
        whole = weight[:, head].clone()
        for sign in (1, -1):
            weight[:, head] = whole * (1 + sign * step)
            for index, sample in enumerate(ids):
                found[index, head] += sign * loss_of(model, sample) / (2 * step)
        weight[:, head] = whole
    return found


def test_head_importance_is_the_mean_magnitude_of_the_slopes_of_the_samples(dense: DenseModel) -> None:
    model, ids = dense.load().double(), CALIBRATION.ids
    found = importance(model, ids)
    assert list(found) == [f"model.layers.{index}" for index in range(3)]
    for index, name in enumerate(found):
        want = slopes(model, model.model.layers[index].self_attn.o_proj, 8, ids)
        torch.testing.assert_close(found[name].double(), want.abs().mean(0), rtol=2e-3, atol=1e-6)
        assert (want.mean(0).abs() < 0.7 * want.abs().mean(0)).any(), "here samples cancel, so that it matters where the magnitude is taken"


def ranked(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """The paper's scores of the groups of two heads that are left of each block, from slopes."""
    found = {}
    for index, block in enumerate(model.model.layers):
        layer = block.self_attn.o_proj
        heads = slopes(model, layer, layer.in_features // 8, ids).abs().mean(0)
        length = sum(float(score) ** 2 for score in heads) ** 0.5
        found[f"model.layers.{index}"] = torch.tensor([float(a + b) / length for a, b in heads.view(-1, 2)], dtype=torch.float64)
    return found


def test_heads_go_in_rounds_each_by_what_is_left(dense: DenseModel, tmp_path: Path) -> None:
    """The artefact is the masked model of a slow transcription: five of twelve groups in rounds of two, two and one."""
    claim = HeadImportance(ratio=0.42, step=0.17).compress(dense, CALIBRATION, tmp_path)
    assert claim.details["rounds"] == [2, 2, 1] and sum(claim.details["head_groups_left"]) == 7
    model, left = dense.load().double(), {f"model.layers.{index}": [0, 1, 2, 3] for index in range(3)}
    for count in (2, 2, 1):
        scores = ranked(model, CALIBRATION.ids)
        order = sorted(
            (float(score), name, position)
            for name, values in scores.items()
            for position, score in enumerate(values)
            if position != int(values.argmax())
        )
        for name in left:
            positions = [position for _, block, position in order[:count] if block == name]
            kept = [position for position in range(len(left[name])) if position not in positions]
            left[name] = [left[name][position] for position in kept]
            cut(model.get_submodule(name).self_attn, kept)
    assert [len(left[name]) for name in left] == claim.details["head_groups_left"]
    found = edited.load(tmp_path)
    assert (logits(found) - logits(model)).abs().max() <= 1e-4 < (logits(found) - logits(dense.load())).abs().max()
    masked: Any = dense.load()
    for name, groups in left.items():
        gone = [group for group in range(4) if group not in groups]
        masked.get_submodule(name).self_attn.o_proj.weight.data.unflatten(1, (4, -1))[:, gone] = 0
    assert (logits(found) - logits(masked)).abs().max() <= 1e-4
    assert claim.parameters == sum(p.numel() for p in found.parameters()) == masked.num_parameters() - 5 * 64 * 8 * 6
    assert claim.cache_bytes_per_token == 7 * 2 * 8 * 4 and claim.format == "edited" and claim.sparsity is None


def cut(attention: Any, groups: list[int]) -> None:
    """Leave some of the groups of an attention of heads of width 8, two for each group."""
    for name, rows in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
        layer = getattr(attention, name)
        layer.weight = nn.Parameter(layer.weight.detach().unflatten(0, (-1, rows))[groups].flatten(0, 1))
        layer.out_features = rows * len(groups)
    layer = attention.o_proj
    layer.weight = nn.Parameter(layer.weight.detach().unflatten(1, (-1, 16))[:, groups].flatten(1))
    layer.in_features = 16 * len(groups)


def test_scores_of_a_block_are_divided_by_their_length_and_summed_over_a_group() -> None:
    heads = torch.tensor([3.0, 0.0, 4.0, 12.0])
    assert of_groups(heads, 2).tolist() == pytest.approx([3 / 13, 16 / 13])
    assert of_groups(10 * heads, 4).tolist() == pytest.approx([3 / 13, 0, 4 / 13, 12 / 13])


def test_blocks_are_compared_with_each_other_and_each_keeps_its_best_group() -> None:
    scores = {"a": torch.tensor([0.1, 0.2]), "b": torch.tensor([0.9, 0.3, 0.4])}
    assert {name: chosen.tolist() for name, chosen in weakest(scores, 2).items()} == {"a": [True, False], "b": [False, True, False]}
    equal = {name: torch.ones(3) for name in "ab"}
    assert {name: chosen.tolist() for name, chosen in weakest(equal, 3).items()} == {"a": [True, True, False], "b": [True, False, False]}


@pytest.mark.parametrize(("ratio", "step", "rounds"), [(0.4, 0.1, [9, 9, 9, 9]), (0.36, 0.1, [9, 9, 9, 5]), (0.01, 0.001, [1])])
def test_rounds_remove_exactly_the_share(ratio: float, step: float, rounds: list[int]) -> None:
    assert HeadImportance(ratio=ratio, step=step).rounds(90, 30) == rounds


@pytest.mark.parametrize("architecture", ["opt", "mixtral", "qwen3"])
def test_heads_of_other_decoders_go_with_their_biases(architecture: str, tmp_path: Path) -> None:
    """The artefact is the model in which nothing reads the heads that are gone."""
    dense = tiny.saved(make(architecture), tmp_path / "source")
    (out := tmp_path / "out").mkdir()
    method = HeadImportance(ratio=0.3)
    method.check(dense.shape)
    claim = method.compress(dense, CALIBRATION, out)
    found, whole = edited.load(out), dense.load()
    masked = dense.load()
    for before, after in zip(anatomy(masked), anatomy(found), strict=True):
        values = before.attention.v.weight.unflatten(0, (before.attention.groups, -1))
        left = after.attention.v.weight.unflatten(0, (after.attention.groups, -1))
        gone = [group for group, value in enumerate(values) if not any(torch.equal(value, other) for other in left)]
        assert len(gone) == before.attention.groups - after.attention.groups
        before.attention.out.weight.data.unflatten(1, (before.attention.groups, -1))[:, gone] = 0
    removed = 4 if architecture == "opt" else 2
    assert sum(claim.details["head_groups_before"]) - sum(claim.details["head_groups_left"]) == removed == sum(claim.details["rounds"])
    torch.testing.assert_close(logits(found), logits(masked), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(masked), logits(whole), atol=1e-3)
    assert claim.parameters == sum(p.numel() for p in found.parameters()) < whole.num_parameters()


@pytest.mark.parametrize(
    ("method", "architecture", "message"),
    [
        (GroupNorm(), "gpt2", "GPT2Block is not built like Llama, OPT or Mixtral"),
        (GroupNorm(), "mixtral", "MixtralDecoderLayer has 4 experts in one tensor"),
        (HeadImportance(), "gpt2", "GPT2Block is not built like Llama, OPT or Mixtral"),
        (HeadImportance(), "qwen2", "1 of 3 groups of heads cannot go from 3 blocks, each of which keeps one"),
    ],
)
def test_what_does_not_fit_is_refused(method: Any, architecture: str, message: str, tmp_path: Path) -> None:
    dense = tiny.saved(make(architecture), tmp_path / "source")
    with pytest.raises(Unsupported, match=message) as refusal:
        method.check(dense.shape)
        method.compress(dense, CALIBRATION, tmp_path)
    assert "\n" not in str(refusal.value) and not (tmp_path / "model.safetensors").exists()


def test_settings_have_ranges() -> None:
    cases: tuple[tuple[Any, dict[str, Any], str], ...] = (
        (GroupNorm, {"ratio": 1.0}, "ratio must be"),
        (HeadImportance, {"ratio": 0.0}, "ratio must be"),
        (HeadImportance, {"step": 0.0}, "step must be"),
    )
    for kind, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            kind(**settings)


def test_llm_pruner_cuts_the_same_units() -> None:
    assert llm_pruner.structures is structures


def test_the_same_comes_out_twice_and_progress_rises_to_the_end(dense: DenseModel, tmp_path: Path) -> None:
    told: list[float] = []
    watched = replace(dense, progress=lambda done, total: told.append(done / total))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        HeadImportance(step=0.2).compress(watched if name == "one" else dense, CALIBRATION, tmp_path / name)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert told == sorted(told) and told[-1] == 1


def test_llama_cpp_is_told_a_width_of_heads_that_is_not_that_of_hidden_states(dense: DenseModel, tmp_path: Path) -> None:
    from gguf import GGUFReader

    from slimbench.methods.formats.gguf import from_huggingface

    (out := tmp_path / "out").mkdir()
    GroupNorm(ratio=0.5).compress(dense, Calibration.none(), out)
    fields = GGUFReader(from_huggingface(out, tmp_path)).fields
    named = ("embedding_length", "attention.head_count", "attention.head_count_kv", "attention.key_length", "feed_forward_length")
    assert [fields[f"llama.{name}"].contents() for name in named] == [64, 4, 2, 8, 64]
