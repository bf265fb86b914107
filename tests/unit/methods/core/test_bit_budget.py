"""Bits spread over layers: the sensitivities against measured divergences, the choice against all choices."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from slimbench.methods.base import DenseModel
from slimbench.methods.core.allocate import allocate, divergences
from slimbench.methods.core.layers import block_linears
from slimbench.methods.formats import packed
from slimbench.methods.kernels.grid import Grid
from slimbench.methods.kernels.rounding import round_to_grid
from slimbench.methods.quantization.weight.mixed_precision import BITS, MixedPrecision
from tests.support import tiny

CALIBRATION = tiny.tokens(samples=16, length=64)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """A model in float32 whose predictions are far from uniform."""
    made = tiny.save_model(tmp_path_factory.mktemp("dense"), dtype="float32", initializer_range=0.15)
    return made


def test_divergences_are_those_that_rounding_a_layer_causes(dense: DenseModel) -> None:
    model = dense.load()
    layers, grids = block_linears(model), [Grid(3, 32), Grid(4, 32)]
    predicted = divergences(model, layers, CALIBRATION.ids, grids, symmetric=True)
    with torch.no_grad():
        before = model(CALIBRATION.ids).logits.log_softmax(-1)
    ratios = []
    for name, layer in layers.items():
        assert predicted[name][0] > 2 * predicted[name][1] > 0
        original = layer.weight.detach().clone()
        with torch.no_grad():
            layer.weight.copy_(round_to_grid(original, grids[1], clip=True).dequantize())
            after = model(CALIBRATION.ids).logits.log_softmax(-1)
            layer.weight.copy_(original)
        ratios.append(predicted[name][1] / float((before.exp() * (before - after)).sum(-1).mean()))
    assert all(0.4 < ratio < 2.5 for ratio in ratios) and 0.7 < sum(ratios) / len(ratios) < 1.4, ratios


def test_the_choice_is_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [3, 1, 1, 3, 8]
    for average in (2.0, 2.5, 3.3, 4.0, 8.0):
        costs = (torch.rand(5, 4, generator=generator) * torch.tensor([8.0, 4.0, 2.0, 1.0])).tolist()
        fits = [c for c in itertools.product(range(4), repeat=5) if sum(s * BITS[i] for s, i in zip(sizes, c, strict=True)) <= average * 16]
        least = min(sum(costs[layer][i] for layer, i in enumerate(c)) for c in fits)
        got = allocate(costs, [1000 * s for s in sizes], BITS, average)
        assert tuple(got) in fits and sum(costs[layer][i] for layer, i in enumerate(got)) == pytest.approx(least)


def test_sizes_without_a_common_divisor_stay_within_the_budget() -> None:
    sizes = [1_000_003, 777_777, 123_457]
    got = allocate([[9, 5, 2, 1]] * 3, sizes, BITS, 3.5)
    used = sum(size * BITS[i] for size, i in zip(sizes, got, strict=True))
    assert 0.8 * 3.5 * sum(sizes) < used <= 3.5 * sum(sizes)
    with pytest.raises(ValueError, match="fewer than the smallest width"):
        allocate([[1, 1, 1, 1]] * 3, sizes, BITS, 1.9)


@pytest.mark.parametrize("rounding", ["nearest", "second-order"])
def test_layers_that_matter_get_more_bits(dense: DenseModel, tmp_path: Path, rounding: str) -> None:
    method = MixedPrecision(average_bits=3.0, group_size=32, rounding=rounding)  # type: ignore[arg-type]
    claim = method.compress(dense, CALIBRATION, tmp_path)
    layers = {n: m for n, m in packed.load(tmp_path).named_modules() if isinstance(m, packed.PackedLinear)}
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    average = sum(layer.grid.bits * layer.in_features * layer.out_features for layer in layers.values()) / weights
    assert claim.bits == pytest.approx(average) and 2.7 < average <= 3.0 and len({layer.grid.bits for layer in layers.values()}) > 1
    stored = 8 * sum(t.nbytes for layer in layers.values() for t in layer.buffers()) / weights
    assert claim.details["stored_bits"] == pytest.approx(stored, rel=0.02) and claim.details["stored_bits"] >= stored
    assert sum(claim.details["layers_by_bits"].values()) == len(layers) == 14


def test_mixing_serves_the_predictions_better_than_one_width(dense: DenseModel, tmp_path: Path) -> None:
    with torch.no_grad():
        want = dense.load()(CALIBRATION.ids).logits.log_softmax(-1)

    def divergence(model: torch.nn.Module) -> float:
        with torch.no_grad():
            return float((want.exp() * (want - model(CALIBRATION.ids).logits.log_softmax(-1))).sum(-1).mean())

    MixedPrecision(average_bits=3.0, group_size=32, rounding="nearest").compress(dense, CALIBRATION, tmp_path)
    uniform = dense.load()
    for layer in block_linears(uniform).values():
        layer.weight.data.copy_(round_to_grid(layer.weight.detach(), Grid(3, 32), clip=True).dequantize())
    assert divergence(packed.load(tmp_path)) < divergence(uniform)


def test_settings_out_of_range_are_one_line() -> None:
    for settings in ({"average_bits": 1.5}, {"average_bits": 9.0}, {"dampening": 0.0}):
        with pytest.raises(ValueError, match=r"^(average_bits|dampening) must be"):
            MixedPrecision(**settings)  # type: ignore[arg-type]
