"""Gates on weights, heads and channels, and the masks of SIMPLE, against formulas written out, on tiny random models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimbench.methods.base import Claim, DenseModel, Method, Unsupported
from slimbench.methods.core.learning.gates import HardConcrete, Pace
from slimbench.methods.formats import edited, huggingface
from slimbench.methods.pruning.gates.hard_concrete import HeadGates, HeadsAndChannels, L0Weights
from slimbench.methods.pruning.gates.simple import LassoMasks, Masks
from slimbench.methods.pruning.gates.weights import WeightGates
from tests.support import tiny
from tests.support.architectures import make

CALIBRATION = tiny.tokens(samples=8, length=32)
FEW: dict[str, Any] = {"steps": 40, "batch_size": 2, "length": 16}
GROUPS, GROUP, CHANNEL = {"llama": 2, "opt": 4}, {"llama": 16 * 64 * 6, "opt": 16 * (3 * 65 + 64)}, {"llama": 3 * 64, "opt": 65 + 64}


@pytest.fixture(scope="module", params=["llama", "opt"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, DenseModel]:
    return request.param, tiny.saved(make(request.param), tmp_path_factory.mktemp(request.param) / "model")


def compressed(method: Method, dense: DenseModel, out: Path) -> Claim:
    out.mkdir()
    method.check(dense.shape)
    return method.compress(dense, CALIBRATION, out)


def units(details: dict[str, Any], architecture: str) -> int:
    """Parameters of the heads and channels that are left."""
    return GROUP[architecture] * sum(details["head_groups_by_block"]) + CHANNEL[architecture] * sum(details["channels_by_block"])


def half_time(details: dict[str, Any]) -> float:
    """By how much ŝ differs from its target in the middle of the run."""
    rows = details["gates"]["path"]
    middle = min(rows, key=lambda row: abs(row[0] - rows[-1][0] / 2))
    return float(middle[1] - middle[2])


def stays(alpha: float, temperature: float) -> float:
    """P(z ≠ 0), as the papers write it."""
    return 1 / (1 + math.exp(-(alpha - temperature * math.log(0.1 / 1.1))))


def test_l0_counts_the_weights_that_are_expected_to_stay_and_multiplies_with_the_others() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    gates = WeightGates({"layer": layer}, 0.4, Pace(10))
    with torch.no_grad():
        gates.alphas["layer"].copy_(3 * torch.randn(3, 5))
    alphas = gates.alphas["layer"].tolist()
    expected = sum(stays(alpha, 2 / 3) for row in alphas for alpha in row)
    assert float(gates.gone().detach()) == pytest.approx(1 - expected / 15, abs=1e-6)
    with torch.no_grad():
        gates.multipliers[0].fill_(-2.0)
        gates.multipliers[1].fill_(3.0)
        gap = 1 - expected / 15 - gates.target()
        assert float(gates.penalty()) == pytest.approx(-2 * gap + 3 * gap**2, abs=1e-5)
    x, z = torch.randn(2, 5), gates.draws()
    with gates.applied(z):
        made = layer(x)
    for sample in range(2):
        for row in range(3):
            total = sum(float(x[sample, j]) * float(layer.weight[row, j]) * float(z["layer"][row, j]) for j in range(5))
            assert float(made[sample, row]) == pytest.approx(total + float(layer.bias[row]), abs=1e-5)
    (gradient,) = torch.autograd.grad(made.sum(), gates.alphas["layer"])
    assert bool((gradient != 0).any())
    before = layer.weight.detach().clone()
    assert gates.finish() == 6
    order = sorted(range(15), key=lambda index: alphas[index // 5][index % 5])
    for place, index in enumerate(order):
        row, column = divmod(index, 5)
        share = 1 / (1 + math.exp(-alphas[row][column]))
        settled = min(1.0, max(0.0, share * 1.2 - 0.1))
        wanted = 0.0 if place < 6 else float(before[row, column]) * (settled or share)
        assert float(layer.weight[row, column]) == pytest.approx(wanted, abs=1e-6)


def test_a_price_stands_in_the_place_of_a_budget() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    gates = WeightGates({"layer": layer}, 0.4, Pace(10, price=0.02))
    with torch.no_grad():
        gates.alphas["layer"].copy_(3 * torch.randn(3, 5))
        for multiplier in gates.multipliers:
            multiplier.fill_(7.0)
    alphas = [alpha for row in gates.alphas["layer"].tolist() for alpha in row]
    assert float(gates.penalty().detach()) == pytest.approx(0.02 * sum(stays(alpha, 2 / 3) for alpha in alphas), abs=1e-6)
    shut = sum(1.2 / (1 + math.exp(-alpha)) - 0.1 <= 0 for alpha in alphas)
    assert gates.finish() == shut and 0 < shut < 15 and shut != 6


@pytest.mark.parametrize("kind", [L0Weights, HeadGates])
def test_a_higher_price_leaves_less(kind: Any, source: tuple[str, DenseModel], tmp_path: Path) -> None:
    _, dense = source
    prices = (1e-9, 1e-4) if kind is L0Weights else (1e-4, 5.0)
    low, high = (compressed(kind(**FEW, price=price), dense, tmp_path / f"{price}") for price in prices)
    gone = [claim.details["gates"]["gone"] for claim in (low, high)]
    assert gone[0] < 0.02 and gone[1] > 0.2, gone
    if kind is HeadGates:
        assert min(high.details["head_groups_by_block"]) >= 1
    with pytest.raises(ValueError, match="price"):
        kind(price=0.0)
    with pytest.raises(ValueError, match="no control"):
        kind(price=1.0, choice="random")


def test_l0_leaves_exactly_as_many_zeros_as_asked_for(source: tuple[str, DenseModel], tmp_path: Path) -> None:
    _, dense = source
    claim = compressed(L0Weights(sparsity=0.4, **FEW | {"steps": 60}), dense, tmp_path / "out")
    layers = tiny.block_layers(huggingface.load(tmp_path / "out"))
    zeros, total = (sum(int(f(layer.weight)) for layer in layers.values()) for f in (lambda w: (w == 0).sum(), Tensor.numel))
    assert zeros == round(0.4 * total) and claim.sparsity == zeros / total and claim.format == "huggingface"
    assert abs(half_time(claim.details)) < 0.05 and claim.details["gates"]["difference"] < 0.02
    assert len(claim.details["gates"]["path"]) == 50 and claim.details["gates"]["path"][-1][0] == 60
    assert claim.training_tokens == 60 * 2 * 16 and claim.teacher is None


def test_heads_have_the_law_and_the_penalty_of_the_paper(
    source: tuple[str, DenseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture, dense = source
    seen: list[Any] = []
    fitted = HeadGates.fitted

    def watched(self: HeadGates, model: Any, gates: Any, *more: Any) -> Any:
        seen.append(gates)
        return fitted(self, model, gates, *more)

    monkeypatch.setattr(HeadGates, "fitted", watched)
    claim = compressed(HeadGates(**FEW), dense, tmp_path / "out")
    (gates,) = seen
    assert gates.law == HardConcrete(0.33, -0.1, 1.1) and [len(alpha) for alpha in gates.alphas.values()] == [GROUPS[architecture]] * 3
    alphas = [alpha for values in gates.alphas.values() for alpha in values.tolist()]
    assert len(set(alphas)) > 1, "heads were told apart"
    expected = sum(stays(alpha, 0.33) for alpha in alphas)
    assert claim.details["gates"]["expected_gone"] == pytest.approx(1 - expected / len(alphas), abs=1e-5)
    gone = {"llama": 2, "opt": 5}[architecture]
    assert gates.share == gone / len(alphas) == pytest.approx(claim.details["gates"]["gone"])
    assert sum(claim.details["head_groups_by_block"]) == 3 * GROUPS[architecture] - gone
    assert claim.details["channels_by_block"] == [128] * 3 and min(claim.details["head_groups_by_block"]) >= 1
    lost = dense.load().num_parameters() - gone * GROUP[architecture]
    assert claim.parameters == edited.load(tmp_path / "out").num_parameters() == lost
    assert abs(half_time(claim.details)) < 0.05 and claim.details["gates"]["difference"] < 0.01


@pytest.mark.parametrize("kind", [HeadsAndChannels, LassoMasks])
def test_heads_and_channels_hold_the_budget_to_the_unit(kind: Any, source: tuple[str, DenseModel], tmp_path: Path) -> None:
    architecture, dense = source
    claim = compressed(kind(**FEW), dense, tmp_path / "out")
    model, whole = edited.load(tmp_path / "out"), 3 * (GROUPS[architecture] * GROUP[architecture] + 128 * CHANNEL[architecture])
    assert claim.parameters == model.num_parameters() and claim.layers == 3
    assert claim.teacher == "the model that the pipeline began with"
    if claim.details.get("hidden", 64) == 64:
        lost = whole - units(claim.details, architecture)
        assert round(0.25 * whole) <= lost < round(0.25 * whole) + GROUP[architecture]
        assert claim.parameters == claim.details["parameters_before"] - lost
    facts = claim.details.get("gates", claim.details)
    assert 0.25 <= facts["gone"] + 1e-9 < 0.25 + GROUP[architecture] / whole
    if "gates" in claim.details:
        assert abs(half_time(claim.details)) < 0.05
        assert facts["difference"] == pytest.approx(abs(facts["gone"] - facts["expected_gone"]))
        assert abs(facts["expected_gone"] - 0.25) < 0.01
    assert torch.isfinite(model(CALIBRATION.ids[:1]).logits).all()


def random_masks(model: Any) -> Masks:
    masks, generator = Masks(model, LassoMasks()), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in masks.values.values():
            value.copy_(torch.rand(len(value), generator=generator) * 1.4 - 0.2)
    return masks


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_masks_are_cut_below_one_threshold_and_folded(architecture: str) -> None:
    model, other = make(architecture), make(architecture)
    masks, same = random_masks(model), random_masks(other)
    assert float(masks.norm().detach()) == pytest.approx(sum(abs(m) for value in masks.values.values() for m in value.tolist()), rel=1e-5)
    whole = masks.nest.total
    final = masks.finish(model, round(0.4 * whole))
    with torch.no_grad(), same.nest.applied(final):
        wanted = other(CALIBRATION.ids, use_cache=False).logits
    with torch.no_grad():
        assert (model(CALIBRATION.ids, use_cache=False).logits - wanted).abs().max() < 1e-4
    limit = masks.threshold
    assert 0.1 < limit < 1.2
    for name, value in masks.values.items():
        gone, size = final[name] == 0, value.detach().abs()
        assert bool(gone.any()) or len(gone) == GROUPS[architecture]
        assert float(size[~gone].max()) == float(size.max()), "the largest of each kind stays"
        if name == "hidden":
            assert torch.equal(gone, size < limit)
        else:
            assert not bool((gone & (size > limit + 0.1)).any()) and not bool((~gone & (size < limit) & (size < size.max())).any())
    lost = whole - masks.nest.held(final)
    assert round(0.4 * whole) <= lost < round(0.4 * whole) + GROUP[architecture]


@pytest.mark.parametrize("kind", [L0Weights, HeadGates, HeadsAndChannels, LassoMasks])
def test_experts_are_refused_in_one_line(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="4 experts in one tensor") as caught:
        compressed(kind(**FEW), tiny.saved(make("mixtral"), tmp_path / "source"), tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_settings_out_of_range_and_budgets_that_cannot_be_are_refused(source: tuple[str, DenseModel], tmp_path: Path) -> None:
    settings: list[tuple[Any, str, float]] = [
        (L0Weights, "sparsity", 1.0),
        (L0Weights, "growth", 0.0),
        (HeadGates, "ratio", 0.0),
        (HeadsAndChannels, "gate_rate", 0.0),
    ]
    for kind, name, value in [*settings, (HeadsAndChannels, "square_rate", -1.0), (LassoMasks, "lasso", 0.0)]:
        with pytest.raises(ValueError, match=name):
            kind(**{name: value})
    with pytest.raises(Unsupported, match="each of which keeps one"):
        HeadGates(ratio=0.9).check(source[1].shape)
    for number, refused in enumerate((HeadsAndChannels(ratio=0.99), LassoMasks(ratio=0.99))):
        with pytest.raises(Unsupported, match="one group of heads and one channel"):
            compressed(refused, source[1], tmp_path / str(number))


def test_the_same_artefact_comes_twice_and_another_seed_gives_another(tmp_path: Path) -> None:
    dense = tiny.saved(make("llama"), tmp_path / "model")
    few = FEW | {"steps": 12}
    methods = (HeadsAndChannels(**few), HeadsAndChannels(**few), HeadsAndChannels(**few, seed=1))
    files = []
    for number, method in enumerate(methods):
        compressed(method, dense, tmp_path / str(number))
        files.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]
