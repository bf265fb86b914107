"""FLAP against a transcription of the paper's formulas and of the authors' choice, on tiny random models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimbench.methods.base import Claim, DenseModel, Unsupported
from slimbench.methods.core.architecture.anatomy import anatomy
from slimbench.methods.core.architecture.units import Structures, cheapest, price, structures
from slimbench.methods.formats import edited
from slimbench.methods.pruning.structured.flap import FLAP, kind_scores
from tests.support import tiny
from tests.support.architectures import make

CALIBRATION = tiny.tokens(samples=6, length=48)
LLAMA = {"self_attn.o_proj": ("q_proj", "k_proj", "v_proj"), "mlp.down_proj": ("gate_proj", "up_proj")}
OPT = {"self_attn.out_proj": ("q_proj", "k_proj", "v_proj"), "fc2": ("fc1",)}


def uneven(model: Any, reads: tuple[str, ...], groups: int = 4) -> Any:
    """Layers that read structures weigh their inputs differently: some channels, and half of the groups of heads, matter little."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(tuple(f"{layer}.weight" for layer in reads)):
                continue
            strength = torch.rand(parameter.shape[1], generator=generator).square().add(0.05)
            if "attn" in name:
                quiet = torch.randperm(groups, generator=generator)[: groups // 2]
                strength = torch.ones(groups).index_fill(0, quiet, 0.05).repeat_interleave(parameter.shape[1] // groups)
            parameter.mul_(strength)
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """Eight query heads in four groups: a group has 3,072 parameters and a channel 192, sixteen to one."""
    model = make("llama", num_attention_heads=8, num_key_value_heads=4)
    return tiny.saved(uneven(model, tuple(LLAMA)), tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.saved(uneven(make("opt"), tuple(OPT)), tmp_path_factory.mktemp("opt") / "model")


def compressed(dense: DenseModel, out: Path, ratio: float = 0.25) -> Claim:
    out.mkdir()
    return FLAP(ratio=ratio).compress(dense, CALIBRATION, out)


def blocks(model: Any) -> Any:
    return model.model.decoder.layers if hasattr(model.model, "decoder") else model.model.layers


def inputs_of(model: Any, layer: nn.Module) -> Tensor:
    """What a layer gets over the calibration text, float64 [tokens, in]."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].double().flatten(0, -2)))
    with torch.inference_mode():
        model(CALIBRATION.ids, use_cache=False)
    hook.remove()
    return torch.cat(seen)


def transcribed(x: Tensor, weight: Tensor, group: int | None) -> list[float]:
    """Score of each head group or, without one, each channel: number by number."""
    tokens, width = x.shape
    inputs, columns, scores = x.T.tolist(), weight.T.tolist(), []
    for j in range(width):
        mean = sum(inputs[j]) / tokens
        fluctuation = sum((value - mean) ** 2 for value in inputs[j]) / (tokens - 1)
        score = fluctuation * sum(value**2 for value in columns[j])
        scores.append(score**2 if group else score)
    middle = sum(scores) / width
    deviation = math.sqrt(sum((score - middle) ** 2 for score in scores) / (width - 1))
    standard = [(score - middle) / deviation for score in scores]
    return [sum(standard[at : at + group]) / group for at in range(0, width, group)] if group else standard


def wanted_structures(model: Any, layout: dict[str, tuple[str, ...]], groups: int, ratio: float) -> dict[tuple[int, str], set[int]]:
    """The authors' one threshold with true costs: structures go in rising order of their scores until enough parameters are gone."""
    scores, costs, total = {}, {}, sum(parameter.numel() for parameter in blocks(model).parameters())
    for index, block in enumerate(blocks(model)):
        for name, makes in layout.items():
            layer = block.get_submodule(name)
            heads = "attn" in name
            width = layer.in_features // groups if heads else 1
            found = transcribed(inputs_of(model, layer), layer.weight.detach().double(), width if heads else None)
            for number, score in enumerate(found):
                scores[index, name, number] = score
            owner = block.get_submodule(name.rpartition(".")[0]) if "." in name else block
            rows = sum(part.numel() for made in makes for part in getattr(owner, made).parameters())
            costs[index, name] = (rows + layer.weight.numel()) // len(found)
    best = {max((k for k in scores if k[:2] == key), key=scores.__getitem__) for key in costs}
    gone: dict[tuple[int, str], set[int]] = {key: set() for key in costs}
    left = ratio * total
    for index, name, number in sorted(scores, key=scores.__getitem__):
        if left <= 0:
            return gone
        if (index, name, number) in best:
            continue
        bias = blocks(model)[index].get_submodule(name)
        left -= costs[index, name] - (bias.out_features if bias.bias is None and not gone[index, name] else 0)
        gone[index, name].add(number)
    return gone


@pytest.mark.parametrize("heads", [True, False])
def test_scores_are_the_papers(heads: bool, llama: DenseModel) -> None:
    model = llama.load()
    kind = structures(anatomy(model)[1])[0 if heads else 1]
    x = inputs_of(model, kind.reads)
    want = transcribed(x, kind.reads.weight.detach().double(), 16 if heads else None)
    assert kind.count == (4 if heads else 128) == len(want)
    torch.testing.assert_close(kind_scores(kind, x.var(0)), torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def masked(dense: DenseModel, gone: dict[tuple[int, str], set[int]], groups: int) -> Any:
    """The dense model in which nothing reads the structures that went, and a bias in the place of their means."""
    model = dense.load()
    for (index, name), numbers in gone.items():
        layer, source = blocks(model)[index].get_submodule(name), dense.load()
        x = inputs_of(source, blocks(source)[index].get_submodule(name))
        width = layer.in_features // groups if "attn" in name else 1
        columns = [number * width + i for number in sorted(numbers) for i in range(width)]
        bias = sum((layer.weight.data[:, j].double() * x[:, j].mean() for j in columns), torch.zeros(64, dtype=torch.float64))
        before = 0 if layer.bias is None else layer.bias.data.double()
        layer.bias = nn.Parameter((before + bias).float())
        layer.weight.data[:, columns] = 0
    return model


@pytest.mark.parametrize(("source", "layout", "groups"), [("llama", LLAMA, 4), ("opt", OPT, 4)])
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_the_cut_model_is_the_masked_one_with_biases(
    source: str, layout: dict[str, tuple[str, ...]], groups: int, ratio: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    dense: DenseModel = request.getfixturevalue(source)
    claim = compressed(dense, tmp_path / "out", ratio)
    whole, model = dense.load(), edited.load(tmp_path / "out")
    gone = wanted_structures(whole, layout, groups, ratio)
    by_kind = {kind: [len(numbers) for (_, name), numbers in gone.items() if ("attn" in name) == kind] for kind in (True, False)}
    assert sum(by_kind[True]) > 0 and len(set(by_kind[False])) > 1, "heads go, and blocks differ"
    assert claim.details["head_groups_by_block"] == [groups - count for count in by_kind[True]]
    assert claim.details["channels_by_block"] == [128 - count for count in by_kind[False]]
    assert claim.details["channels_left"] == [384 - sum(by_kind[False]), 384]
    assert claim.details["head_groups_left"] == [3 * groups - sum(by_kind[True]), 3 * groups]
    want = masked(dense, gone, groups)
    with torch.inference_mode():
        got, masks, before = (m(CALIBRATION.ids).logits for m in (model, want, whole))
    assert float((got - masks).abs().max()) <= 1e-4
    assert float((masks - before).abs().max()) > 1e-2
    group, channel = (3072, 192) if source == "llama" else (16 * (3 * 65 + 64), 129)
    bias = 0 if source == "opt" else 64 * sum(bool(numbers) for numbers in gone.values())
    lost = group * sum(by_kind[True]) + channel * sum(by_kind[False]) - bias
    assert claim.parameters == model.num_parameters() == whole.num_parameters() - lost
    asked = ratio * sum(parameter.numel() for parameter in blocks(whole).parameters())
    assert asked <= lost < asked + group
    assert claim.layers == 3 and claim.sparsity is None and claim.format == "edited"
    width = 8 if source == "llama" else 16
    assert claim.cache_bytes_per_token == (3 * groups - sum(by_kind[True])) * width * 2 * 4


def test_a_bias_does_what_inputs_that_stand_still_at_their_mean_would(llama: DenseModel, tmp_path: Path) -> None:
    """In the last block, where the inputs of the dense model are given: its outputs are those with the removed inputs at their means."""
    whole = llama.load()
    gone = wanted_structures(whole, LLAMA, 4, 0.5)
    compressed(llama, tmp_path / "out", 0.5)
    model = edited.load(tmp_path / "out")
    numbers = sorted(gone[2, "mlp.down_proj"])
    left = [number for number in range(128) if number not in gone[2, "mlp.down_proj"]]
    assert numbers
    x = inputs_of(whole, whole.model.layers[2].mlp.down_proj)
    still = x.clone()
    still[:, numbers] = x.mean(0)[numbers]
    want = still @ whole.model.layers[2].mlp.down_proj.weight.double().T
    layer = model.model.layers[2].mlp.down_proj
    got = x[:, left] @ layer.weight.double().T + layer.bias.double()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    dense_mean = (x @ whole.model.layers[2].mlp.down_proj.weight.double().T).mean(0)
    torch.testing.assert_close(got.mean(0), dense_mean, rtol=1e-5, atol=1e-6)


def test_groups_of_heads_cost_what_their_shapes_say() -> None:
    group, channel = (price(kind) for kind in structures(anatomy(make("llama"))[0]))
    assert (group, channel) == (16 * 64 * (2 + 1 + 1) + 32 * 64, 3 * 64) and group / channel != pytest.approx(512 / 3, rel=0.1)
    group, channel = (price(kind) for kind in structures(anatomy(make("opt"))[0]))
    assert (group, channel) == (16 * (3 * 65 + 64), 65 + 64)


def kind_of(name: str, count: int, width: int) -> Structures:
    """Structures of `width` inputs each, read by a layer [4, count · width] without a bias; each has 12 · `width` parameters."""
    make_layer, reads = nn.Linear(8, count * width, bias=False), nn.Linear(count * width, 4, bias=False)
    return Structures(name, count, (make_layer,), reads)


def test_equal_scores_go_in_order_and_the_best_of_a_kind_stays() -> None:
    kinds = {"heads": kind_of("head_groups", 3, 5), "channels": kind_of("channels", 6, 1)}
    scores = {"heads": torch.tensor([0.0, -1.0, 0.0]), "channels": torch.zeros(6)}
    assert [price(kind) for kind in kinds.values()] == [60, 12]
    masks = [cheapest(scores, kinds, wanted, biased=True) for wanted in (1, 56, 57, 117)]
    heads, channels = ([mask[name].int().tolist() for mask in masks] for name in kinds)
    assert heads == [[0, 1, 0], [0, 1, 0], [0, 1, 1], [0, 1, 1]]
    assert channels == [[0, 0, 0, 0, 0, 0]] * 3 + [[0, 1, 0, 0, 0, 0]]
    with pytest.raises(Unsupported, match="leave 172 parameters to prune, fewer than 173"):
        cheapest(scores, kinds, 173, biased=True)
    assert cheapest(scores, kinds, 172, biased=True)["channels"].tolist() == [False] + [True] * 5


def test_a_second_cut_adds_to_the_biases_of_the_first(llama: DenseModel, tmp_path: Path) -> None:
    first = compressed(llama, tmp_path / "one")
    again = tiny.dense_model(tmp_path / "one", "float32", format="edited")
    second = compressed(again, tmp_path / "two", 0.2)
    model = edited.load(tmp_path / "two")
    assert second.parameters == model.num_parameters() < first.parameters == edited.load(tmp_path / "one").num_parameters()
    with torch.inference_mode():
        logits = [m(CALIBRATION.ids).logits for m in (llama.load(), edited.load(tmp_path / "one"), model)]
    errors = [float((other - logits[0]).norm()) for other in logits[1:]]
    assert errors[0] < errors[1] < float("inf")


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("mixtral", "MixtralDecoderLayer has 4 experts in one tensor in the place of an MLP"),
        ("gpt2", "GPT2Block is not built like Llama, OPT or Mixtral"),
    ],
)
def test_other_decoders_are_refused_in_one_line(architecture: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=message) as caught:
        FLAP().compress(tiny.saved(make(architecture), tmp_path / "source"), CALIBRATION, tmp_path)
    assert "\n" not in str(caught.value)


def test_more_than_can_go_is_refused(llama: DenseModel, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="one group of heads and one channel in each block leave"):
        FLAP(ratio=0.99).compress(llama, CALIBRATION, tmp_path)
    with pytest.raises(ValueError, match="ratio must be between 0 and 1"):
        FLAP(ratio=0.0)


def test_the_same_artefact_comes_twice(opt: DenseModel, tmp_path: Path) -> None:
    first, second = (compressed(opt, tmp_path / name) for name in ("one", "two"))
    assert first == second
    for file in ("model.safetensors", "edited.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
