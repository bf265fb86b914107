"""SpQR's two levels: their format, and the whole method against the paper's Algorithm 1, written out in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.methods.base import DenseModel, Unsupported
from slimbench.methods.core.second_order import Moments
from slimbench.methods.formats import codebook
from slimbench.methods.formats.bilevel import Bilevel
from slimbench.methods.formats.codebook import CodebookLinear, CodebookWeight
from slimbench.methods.quantization.grids import bilevel
from slimbench.methods.quantization.weight.spqr import SpQRBilevel
from tests.support import tiny

SIZE, SPAN, DAMPENING = 16, 16, 0.01


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"))


def moments(inputs: int) -> Moments:
    found = Moments.zeros(inputs, torch.device("cpu"))
    found.add(torch.randn(500, inputs) @ torch.randn(inputs, inputs))
    return found


def quantize(weight: Tensor, seen: Moments, fraction: float) -> CodebookWeight:
    table = torch.arange(8, dtype=weight.dtype).view(1, 1, -1, 1)
    return bilevel.quantize(weight, seen, table, 3, SIZE, 3, DAMPENING, fraction)


def two_levels(values: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Statistics [out] of one group of inputs, rounded as the paper says: by runs of 16 outputs, from the smallest to the largest."""
    rounded = []
    for run in values.split(SPAN):
        low = run.min().to(dtype).double()
        step = ((run.max() - low) / (2**bits - 1)).to(dtype).double()
        rounded.append(low + ((run - low) / step).round().clamp(0, 2**bits - 1) * step)
    return torch.cat(rounded)


def minmax_error(weights: Tensor, cost: Tensor) -> float:
    """Cost of rounding weights to 3 bits between their smallest and their largest."""
    step = (weights.max() - weights.min()) / 7
    return float(((((weights - weights.min()) / step).round() * step + weights.min() - weights).square() * cost).sum())


def gain(group: Tensor, cost: Tensor, left_out: int) -> float:
    others = torch.arange(len(group)) != left_out
    return minmax_error(group, cost) - minmax_error(group[others], cost[others])


def algorithm(weight: Tensor, hessian: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of the paper in float64, the inverse taken anew for each column: the rounded weight and the mask of outliers."""
    work, inputs = weight.double().clone(), weight.shape[1]
    damped = hessian.double() + DAMPENING * hessian.double().diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    inverses = [damped[j:, j:].inverse() for j in range(inputs)]
    cost = torch.stack([1 / inverse[0, 0] for inverse in inverses])

    def gains_of(weights: Tensor, begin: int) -> Tensor:
        price = cost[begin : begin + SIZE]
        return torch.tensor([[gain(row, price, j) for j in range(SIZE)] for row in weights[:, begin : begin + SIZE]])

    first = torch.cat([gains_of(work, begin) for begin in range(0, inputs, SIZE)], dim=1).flatten().sort().values
    threshold = first[max(1, round((1 - fraction) * len(first))) - 1]
    rounded, mask = torch.empty_like(work), torch.zeros_like(work, dtype=torch.bool)
    for j in range(inputs):
        if j % SIZE == 0:
            group, found = work[:, j : j + SIZE], gains_of(work, j) > threshold
            mask[:, j : j + SIZE] = found
            kept = [row[~out] for row, out in zip(group, found, strict=True)]
            low, high = (torch.stack([getattr(row, end)() for row in kept]) for end in ("min", "max"))
            exact = (high - low) / 7
            scales, zeros = (two_levels(values, 3, weight.dtype) for values in (exact, -low / exact))
        codes = (torch.where(mask[:, j], 0.0, work[:, j]) / scales + zeros).round().clamp(0, 7)
        rounded[:, j] = torch.where(mask[:, j], work[:, j].to(weight.dtype).double(), scales * (codes - zeros))
        work[:, j:] -= torch.outer(work[:, j] - rounded[:, j], inverses[j][0] / inverses[j][0, 0])
    return rounded, mask


def test_it_is_the_algorithm_of_the_paper() -> None:
    torch.manual_seed(0)
    weight, seen = torch.randn(32, 64), moments(64)
    weight[torch.arange(0, 32, 4), torch.arange(0, 64, 8)] = 6.0
    got = quantize(weight, seen, fraction=0.02)
    want, mask = algorithm(weight, seen.hessian, fraction=0.02)
    assert got.outliers is not None
    ours = torch.zeros_like(mask)
    ours[got.outliers.rows, got.outliers.columns.long()] = True
    assert torch.equal(ours, mask) and 20 <= int(mask.sum()) < 100 and int(mask[torch.arange(0, 32, 4), torch.arange(0, 64, 8)].sum()) >= 7
    torch.testing.assert_close(got.dequantize().double(), want, rtol=1e-3, atol=1e-3)


def test_scales_and_zeros_of_two_levels_are_their_definition() -> None:
    torch.manual_seed(0)
    scales, zeros = torch.rand(48, 5) + 0.1, 3 + torch.rand(48, 5)
    zeros[:16, 2] = 3.25  # all alike
    made = Bilevel.of(scales, zeros, 3, torch.bfloat16)
    assert made.bits == 3 and made.codes.shape == (2, 5, 18) and made.ranges.shape == (2, 2, 5, 3)
    for exact, rounded in zip((scales, zeros), made.expand(), strict=True):
        assert rounded.shape == exact.shape
        for group in range(5):
            for first in range(0, 48, SPAN):
                run = exact[first : first + SPAN, group]
                assert len(rounded[first : first + SPAN, group].unique()) <= 8
                half_a_step = (run.max() - run.min()) / 14
                assert bool(((rounded[first : first + SPAN, group] - run).abs() <= 1.05 * half_a_step + 2**-8 * run.abs()).all())
    with pytest.raises(ValueError, match="groups of 16 rows do not divide 40 outputs"):
        Bilevel.of(scales[:40], zeros[:40], 3, torch.bfloat16)


def test_what_is_stored_is_what_the_paper_counts(dense: DenseModel, tmp_path: Path) -> None:
    """3 bits, 2 · 3 for a group of 16, four numbers of 16 bits for 16 such groups; an outlier 48 bits, and where those of a row begin."""
    claim = SpQRBilevel().compress(dense, tiny.tokens(samples=4, length=64), tmp_path)
    model = codebook.load(tmp_path)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, CodebookLinear)}
    total = sum(layer.in_features * layer.out_features for layer in layers.values())
    outliers = sum(len(layer.weight_in_parts.outliers.values) for layer in layers.values())  # type: ignore[union-attr]
    starts = sum(32 * (layer.out_features + 1) for layer in layers.values())
    bits = 3 + 2 * 3 / 16 + 4 * 16 / (16 * SPAN) + (48 * outliers + starts + 8 * 16) / total
    assert claim.details["stored_bits"] == pytest.approx(bits, abs=2e-4)
    assert TransformersModel(model, "cpu").evidence().effective_bits == pytest.approx(bits, abs=2e-4)
    assert (claim.bits, claim.group_size) == (3, 16)
    assert claim.details["outlier_fraction"] == pytest.approx(outliers / total, abs=1e-6) and 0.005 < outliers / total < 0.03
    assert len({layer.codebook.data_ptr() for layer in layers.values()}) == 1 and len(layers) == 14


def test_outputs_that_no_second_level_divides_are_refused(tmp_path: Path) -> None:
    odd = tiny.save_model(tmp_path / "odd", intermediate_size=80, hidden_size=80, num_attention_heads=10, num_key_value_heads=5)
    with pytest.raises(Unsupported, match="second-level groups of 16 rows do not divide the 40 outputs"):
        SpQRBilevel().compress(odd, tiny.tokens(samples=4, length=128), tmp_path / "out")
