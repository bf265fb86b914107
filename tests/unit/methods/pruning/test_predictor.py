"""Pruning by a predictor of accuracy: its draws, its losses, its ranks and its choice, on tiny random models."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slimbench.methods.base import Calibration, Claim, DenseModel, Unsupported
from slimbench.methods.core.architecture.units import kinds_of
from slimbench.methods.formats import edited
from slimbench.methods.pruning.structured import predictor as predictors
from slimbench.methods.pruning.structured.predictor import AccuracyPredictor, draw, energies, fit, loss, shares
from tests.support import tiny
from tests.support.architectures import make

CALIBRATION = tiny.tokens(samples=6, length=24)
FEW = {"configurations": 12, "candidates": 40, "tokens": 48}
LAYERS = {"llama": (("self_attn.o_proj", 16 * 2), ("mlp.down_proj", 1)), "opt": (("self_attn.out_proj", 16), ("fc2", 1))}
PRICES = {"llama": (16 * 64 * 4 + 32 * 64, 3 * 64), "opt": (16 * (3 * 65 + 64), 65 + 64)}


@pytest.fixture(scope="module", params=["llama", "opt"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, DenseModel]:
    """A group of heads is worth 32 or 37 channels."""
    model = make(request.param)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for block in blocks(model):
            for name, _ in LAYERS[request.param]:
                weight = block.get_submodule(name).weight
                weight.mul_(6 * torch.rand(weight.shape[1], generator=generator) ** 2)
    return request.param, tiny.saved(model, tmp_path_factory.mktemp(request.param) / "model")


def compressed(dense: DenseModel, out: Path, **settings: Any) -> Claim:
    out.mkdir()
    return AccuracyPredictor(**(FEW | settings)).compress(dense, CALIBRATION, out)


def blocks(model: Any) -> Any:
    return model.model.decoder.layers if hasattr(model.model, "decoder") else model.model.layers


def inputs_of(model: Any, layer: Any, ids: Tensor) -> list[list[float]]:
    """What a layer gets of a text, [in][tokens]."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double().flatten(0, -2)))
    with torch.inference_mode():
        model(ids, use_cache=False)
    hook.remove()
    return torch.cat(seen).T.tolist()


def ranked(model: Any, layers: tuple[tuple[str, int], ...], ids: Tensor) -> dict[tuple[int, str], list[float]]:
    """S of the structures, input by input: the mean square of each times the squared norm of the column that reads it."""
    found = {}
    for index, block in enumerate(blocks(model)):
        for name, width in layers:
            layer = block.get_submodule(name)
            columns = layer.weight.detach().double().T.tolist()
            each = [
                sum(v * v for v in values) / len(values) * sum(w * w for w in column)
                for values, column in zip(inputs_of(model, layer, ids), columns, strict=True)
            ]
            found[index, name] = [sum(each[at : at + width]) for at in range(0, len(each), width)]
    return found


def measured(model: Any, ids: Tensor) -> float:
    """Mean −log p of the next token, token by token."""
    with torch.inference_mode():
        probabilities = model(ids, use_cache=False).logits.double().softmax(-1)
    found = [-math.log(float(probabilities[s, t, ids[s, t + 1]])) for s in range(len(ids)) for t in range(ids.shape[1] - 1)]
    return sum(found) / len(found)


def test_the_structures_go_that_add_least_and_the_loss_is_that_of_other_samples(source: tuple[str, DenseModel], tmp_path: Path) -> None:
    architecture, dense = source
    claim = compressed(dense, tmp_path / "out", ratio=0.5)
    whole, model = dense.load(), edited.load(tmp_path / "out")
    scores = ranked(whole, LAYERS[architecture], CALIBRATION.ids[:4])
    (heads, width), (channels, _) = LAYERS[architecture]
    left = {heads: claim.details["head_groups_by_block"], channels: claim.details["channels_by_block"]}
    assert len(set(left[channels])) > 1
    for (index, name), values in scores.items():
        stay = sorted(sorted(range(len(values)), key=values.__getitem__)[len(values) - left[name][index] :])
        each = width if name == heads else 1
        columns = [number * each + at for number in stay for at in range(each)]
        before, after = (blocks(m)[index].get_submodule(name).weight for m in (whole, model))
        assert torch.equal(after, before[:, columns])
    held = CALIBRATION.ids[4:]
    assert claim.details["loss_chosen"] == pytest.approx(measured(model, held), abs=1e-5)
    assert claim.details["loss_dense"] == pytest.approx(measured(whole, held), abs=1e-5)
    assert abs(claim.details["loss_chosen"] - claim.details["loss_dense"]) > 1e-4
    assert abs(measured(model, held) - measured(model, CALIBRATION.ids[:4])) > 1e-3


def test_as_many_parameters_go_as_were_asked_for(source: tuple[str, DenseModel], tmp_path: Path) -> None:
    architecture, dense = source
    claim = compressed(dense, tmp_path / "out", ratio=0.4)
    whole, model = dense.load(), edited.load(tmp_path / "out")
    groups, (group, channel) = (2 if architecture == "llama" else 4), PRICES[architecture]
    left = claim.details["head_groups_by_block"], claim.details["channels_by_block"]
    lost = group * (3 * groups - sum(left[0])) + channel * (3 * 128 - sum(left[1]))
    asked = 0.4 * sum(parameter.numel() for parameter in blocks(whole).parameters())
    assert asked <= lost < asked + channel
    assert claim.parameters == model.num_parameters() == whole.num_parameters() - lost
    assert claim.cache_bytes_per_token == sum(left[0]) * 2 * 16 * 4
    assert claim.layers == 3 and claim.format == "edited" and claim.training_tokens == 0 and claim.sparsity is None
    assert claim.details["configurations"] == [8, 4]


def test_all_draws_have_the_same_parameters_and_differ(source: tuple[str, DenseModel]) -> None:
    architecture, dense = source
    kinds, (group, channel) = kinds_of(dense.load()), PRICES[architecture]
    found, generator = [], np.random.default_rng(0)
    for _ in range(40):
        gone = draw(kinds, 40_000, 0.6, generator)
        assert all(0 <= gone[name] < kind.count for name, kind in kinds.items()), "one of each kind stays"
        lost = sum(gone[name] * (group if kind.name == "head_groups" else channel) for name, kind in kinds.items())
        assert 40_000 <= lost < 40_000 + channel
        found.append(tuple(gone.values()))
    assert len(set(found)) > 35
    heads = [sum(gone[::2]) for gone in found]
    assert len(set(heads)) > 1 and max(heads) <= 0.6 * sum(kind.count for kind in kinds.values() if kind.name == "head_groups")
    spare = sum((kind.count - 1) * (group if kind.name == "head_groups" else channel) for kind in kinds.values())
    assert list(draw(kinds, spare, 0.6, generator).values()) == [kind.count - 1 for kind in kinds.values()]
    with pytest.raises(Unsupported, match=f"one channel in each block leave {spare} parameters to prune, fewer than"):
        draw(kinds, spare + 1, 0.6, generator)


def test_losses_are_those_of_models_in_which_nothing_reads_what_is_gone(source: tuple[str, DenseModel]) -> None:
    architecture, dense = source
    model, ids = dense.load(), CALIBRATION.ids[4:]
    kinds = kinds_of(model)
    scores = energies(model, kinds, CALIBRATION.ids[:4])
    gone = {name: 1 if kind.name == "head_groups" else 20 * (index + 1) for index, (name, kind) in enumerate(kinds.items())}
    got = loss(model, kinds, scores, ids, gone)
    assert loss(model, kinds, scores, ids, dict.fromkeys(kinds, 0)) == pytest.approx(measured(model, ids), abs=1e-5)
    assert [name.partition("layers.")[2][2:] for name in kinds] == [name for name, _ in LAYERS[architecture]] * 3
    wanted = ranked(dense.load(), LAYERS[architecture], CALIBRATION.ids[:4])
    with torch.no_grad():
        for name, values in zip(kinds, wanted.values(), strict=True):
            weight = model.get_parameter(f"{name}.weight")
            for number in sorted(range(len(values)), key=values.__getitem__)[: gone[name]]:
                weight.unflatten(1, (len(values), -1))[:, number] = 0
    assert got == pytest.approx(measured(model, ids), abs=1e-5)


def additive(shares_gone: list[float]) -> float:
    """A loss to which the blocks contribute differently."""
    return 3 + sum((index + 1) ** 2 * share**2 for index, share in enumerate(shares_gone)) / 10


def test_the_predictor_ranks_configurations_it_has_not_seen() -> None:
    kinds = kinds_of(make("llama"))
    generator = np.random.default_rng(1)
    drawn = [shares(kinds, draw(kinds, 40_000, 0.6, generator)) for _ in range(60)]
    losses = [additive(configuration) for configuration in drawn]
    predictor, rank = fit(drawn, losses, 0)
    predicted = list(predictor.predict(drawn[42:]))
    places = [[sorted(values).index(value) for value in values] for values in (predicted, losses[42:])]
    if len(set(predicted)) == 18:
        d = sum((a - b) ** 2 for a, b in zip(*places, strict=True))
        assert rank == pytest.approx(1 - 6 * d / (18 * (18**2 - 1)), abs=1e-4)
    assert rank is not None and rank > 0.6
    noise = [*losses[:42], *reversed(losses[42:])]
    assert np.array_equal(fit(drawn, noise, 0)[0].predict(drawn), predictor.predict(drawn)), "the others are not learned from"
    assert fit(drawn, [1.0] * 60, 0)[1] is None


def test_the_configuration_of_the_lowest_predicted_loss_is_cut(
    source: tuple[str, DenseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, int]] = []

    def noted(*arguments: Any) -> dict[str, int]:
        seen.append(draw(*arguments))
        return seen[-1]

    class Planted:
        def predict(self, configurations: list[list[float]]) -> Any:
            assert len(configurations) == 40
            return np.array([additive(configuration) for configuration in configurations])

    monkeypatch.setattr(predictors, "draw", noted)

    def fitted(configurations: list[list[float]], losses: list[float], seed: int) -> tuple[Any, float]:
        scores = energies(model, kinds, CALIBRATION.ids[:4])
        assert losses == [loss(model, kinds, scores, CALIBRATION.ids[4:], gone) for gone in seen] and len(losses) == 12
        assert configurations == [[gone[name] / kind.count for name, kind in kinds.items()] for gone in seen]
        return Planted(), 0.5

    monkeypatch.setattr(predictors, "fit", fitted)
    model = source[1].load()
    kinds = kinds_of(model)
    claim = compressed(source[1], tmp_path / "out")
    best = min(seen[12:], key=lambda gone: additive([gone[name] / kind.count for name, kind in kinds.items()]))
    left = [kind.count - best[name] for name, kind in kinds.items()]
    assert (claim.details["head_groups_by_block"], claim.details["channels_by_block"]) == (left[::2], left[1::2])
    assert len(seen) == 52 and claim.details["spearman"] == 0.5


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("mixtral", "MixtralDecoderLayer has 4 experts in one tensor in the place of an MLP"),
        ("gpt2", "GPT2Block is not built like Llama, OPT or Mixtral"),
    ],
)
def test_other_decoders_are_refused_in_one_line(architecture: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=message) as caught:
        compressed(tiny.saved(make(architecture), tmp_path / "source"), tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_settings_and_texts_that_do_not_fit_are_refused(source: tuple[str, DenseModel], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ratio must be between 0 and 1"):
        AccuracyPredictor(ratio=0.0)
    with pytest.raises(ValueError, match="configurations must be at least 10, not 9"):
        AccuracyPredictor(configurations=9)
    with pytest.raises(ValueError, match="candidates and tokens must be at least 1, not 0 and 2048"):
        AccuracyPredictor(candidates=0)
    with pytest.raises(Unsupported, match="one group of heads and one channel in each block leave"):
        compressed(source[1], tmp_path / "one", ratio=0.99)
    with pytest.raises(ValueError, match="fewer than two samples"):
        AccuracyPredictor().compress(source[1], Calibration(CALIBRATION.ids[:1], "one"), tmp_path)


def test_the_same_artefact_comes_twice_and_another_seed_draws_others(source: tuple[str, DenseModel], tmp_path: Path) -> None:
    first, second = (compressed(source[1], tmp_path / name) for name in ("one", "two"))
    assert first == second
    for file in ("model.safetensors", "edited.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert compressed(replace(source[1], seed=1), tmp_path / "three").details["loss_drawn"] != first.details["loss_drawn"]
