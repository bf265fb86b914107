"""The clipping of AWQ against a slow transcription of the authors' code, `auto_clip_layer`, that knows nothing of Gram matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimbench.methods.core.statistics import Inputs
from slimbench.methods.kernels.grid import Grid
from slimbench.methods.kernels.rounding import round_to_grid
from slimbench.methods.quantization.weight.awq_clip import AWQClip, clipped


def transcribed(weight: Tensor, x: Tensor, bits: int, size: int, symmetric: bool) -> Tensor:
    """Row by row, group by group, step by step: outputs of the clamped and rounded group beside those of the group as it was."""
    made = weight.clone()
    for row in range(weight.shape[0]):
        for at in range(0, weight.shape[1], size):
            part, features = weight[row, at : at + size], x[:, at : at + size]
            best = (float("inf"), 0.0)
            for step in range(int(0.5 * 20)):
                most = part.abs().max().item() * (1 - step / 20)
                cut = part.clamp(-most, most)
                if symmetric:
                    scale = 2 * cut.abs().max() / (2**bits - 1)
                    points = (cut / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
                else:
                    scale = (cut.max() - cut.min()) / (2**bits - 1)
                    points = ((cut - cut.min()) / scale - 2 ** (bits - 1)).round() * scale + cut.min() + 2 ** (bits - 1) * scale
                error = ((features @ points - features @ part) ** 2).mean().item()
                if error < best[0]:
                    best = (error, most)
            made[row, at : at + size] = part.clamp(-best[1], best[1])
    return made


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_clipping_is_that_of_the_authors_code(bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(6, 64, generator=generator) * torch.rand(64, generator=generator).add(0.1)
    weight[:, ::9] *= 6
    x = torch.randn(80, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    got = clipped(weight, x.T @ x / len(x), Grid(bits, 32), symmetric)  # type: ignore[arg-type]
    want = transcribed(weight, x, bits, 32, symmetric)
    assert torch.allclose(got, want)
    assert (got != weight).any() and (got == weight).any(), "some groups are clipped, some weights are not"


def test_a_feature_that_matters_is_not_cut() -> None:
    """By the weights' own error the range would shrink; the outputs hang on the largest weight alone."""
    weight = torch.linspace(-0.1, 0.1, 32).repeat(2, 1)
    weight[:, 5] = 1.0
    gram = torch.full((32,), 1e-6).diag()
    gram[5, 5] = 1.0
    assert torch.equal(clipped(weight, gram, Grid(3, 32), True), weight)
    turned = torch.full((32,), 1.0).diag()
    turned[5, 5] = 1e-6
    assert clipped(weight, turned, Grid(3, 32), True)[0, 5] == pytest.approx(0.55)


def test_its_settings_are_those_of_awq() -> None:
    with pytest.raises(ValueError, match="candidates must be at least 3"):
        AWQClip(candidates=2)
    assert AWQClip().weight_grid == "with offsets, searched" and AWQClip(symmetric=True).weight_grid == "symmetric, searched"


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("q_proj", True),
        ("k_proj", True),
        ("qkv_proj", True),
        ("query_key_value", True),
        ("Wqkv", True),
        ("v_proj", False),
        ("down_proj", False),
    ],
)
def test_queries_and_keys_are_not_clipped_fused_ones_neither(name: str, whole: bool) -> None:
    """As in the authors' code; the other layers are, where that brings outputs closer."""
    torch.manual_seed(0)
    layer, x, grid = torch.nn.Linear(64, 32, bias=False), torch.randn(256, 64), Grid(3, 32)
    seen = Inputs(x.amin(0), x.amax(0), x.mean(0), x.square().mean(0), x.T @ x / len(x), len(x))
    ((_, made),) = AWQClip(bits=3, group_size=32)._codes({f"model.layers.0.{name}": layer}, {f"model.layers.0.{name}": seen}, grid)
    plain = round_to_grid(layer.weight.detach(), grid, False)
    assert torch.equal(made.dequantize(), plain.dequantize()) is whole
