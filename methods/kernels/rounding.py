"""Rounding to nearest on a uniform grid, for every method that does no more than that.

Symmetric (as in compressed-tensors and GPTQ): scale = max|w| / (2^bits - 1) · 2, codes -2^(bits-1) .. 2^(bits-1) - 1, and zero is on
the grid, so pruned weights stay zero. Asymmetric: the grid runs from the smallest to the largest weight of the group; it is finer,
but zero is in general not on it. Scales and offsets are first rounded to the dtype in which they are stored, and the codes then
chosen for those rounded values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from slimbench.methods.kernels.grid import Grid, QuantizedWeight


def round_to_grid(weight: Tensor, grid: Grid, symmetric: bool = True, clip: bool = False) -> QuantizedWeight:
    """Quantize a weight matrix [out, in] of the model's dtype; `clip` as in `fit_groups`."""
    from slimbench.methods.kernels.grid import QuantizedWeight

    groups = weight.float().unflatten(1, (-1, grid.group_size or weight.shape[1]))
    scales, offsets = fit_groups(groups, grid.bits, weight.dtype, symmetric, clip)
    return QuantizedWeight(grid, nearest_codes(groups, scales, offsets, grid).flatten(1), scales, offsets)


def fit_groups(groups: Tensor, bits: int, dtype: torch.dtype, symmetric: bool = True, clip: bool = False) -> tuple[Tensor, Tensor | None]:
    """Scales, and offsets of an asymmetric grid, both [...] of `dtype`, for groups [..., n] in float32.

    Args:
        clip: Shrink the range of each group as far as its squared rounding error falls, down to three tenths.
    """
    import torch

    low, high = groups.amin(-1), groups.amax(-1)
    scales, offsets = _grid_over(low, high, bits, dtype, symmetric)
    if not clip:
        return scales, offsets
    least = _rounding_error(groups, scales, offsets, bits)
    for percent in range(98, 28, -2):
        tried, shifted = _grid_over(low * (percent / 100), high * (percent / 100), bits, dtype, symmetric)
        error = _rounding_error(groups, tried, shifted, bits)
        better = error < least
        least = torch.where(better, error, least)
        scales = torch.where(better, tried, scales)
        offsets = None if offsets is None or shifted is None else torch.where(better, shifted, offsets)
    return scales, offsets


def nearest_codes(groups: Tensor, scales: Tensor, offsets: Tensor | None, grid: Grid) -> Tensor:
    """Codes of the nearest points for groups [..., n] in float32, as a `QuantizedWeight` holds them."""
    import torch

    return (_steps(groups, scales, offsets, grid.bits) + grid.mid).to(torch.int8 if grid.bits == 8 else torch.uint8)


def _grid_over(low: Tensor, high: Tensor, bits: int, dtype: torch.dtype, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Scales and offsets of grids over ranges."""
    import torch

    span = 2 * torch.maximum(-low, high) if symmetric else high - low
    scales = (span / (2**bits - 1)).to(dtype)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    return scales, None if symmetric else (low + 2 ** (bits - 1) * scales.float()).to(dtype)


def _steps(groups: Tensor, scales: Tensor, offsets: Tensor | None, bits: int) -> Tensor:
    """Nearest points, in steps of the scale from the middle of the grid."""
    half = 2 ** (bits - 1)
    if offsets is not None:
        groups = groups - offsets.float().unsqueeze(-1)
    return (groups / scales.float().unsqueeze(-1)).round_().clamp_(-half, half - 1)


def _rounding_error(groups: Tensor, scales: Tensor, offsets: Tensor | None, bits: int) -> Tensor:
    """Squared error [...] of rounding groups [..., n] to nearest."""
    rounded = _steps(groups, scales, offsets, bits) * scales.float().unsqueeze(-1)
    if offsets is not None:
        rounded = rounded + offsets.float().unsqueeze(-1)
    return (rounded - groups).square_().sum(-1)


def round_head(model: PreTrainedModel, bits: Literal[4, 8] | None) -> Iterator[tuple[str, QuantizedWeight]]:
    """The output head to nearest, symmetric: 8 bits with one scale a row, 4 bits with one for 32 inputs; nothing without `bits`.

    A head that shares its weight with the input embedding takes it along.
    """
    from slimbench.methods.kernels.grid import Grid

    head = model.get_output_embeddings()
    if bits is not None:
        name = next(name for name, module in model.named_modules() if module is head)
        yield name, round_to_grid(head.weight.detach(), Grid(bits, 32 if bits == 4 else None))


def round_layers(
    layers: dict[str, nn.Linear], grid: Grid, symmetric: bool = True, clip: bool = False
) -> Iterator[tuple[str, QuantizedWeight]]:
    """Quantize layers one at a time; `clip` as in `fit_groups`."""
    for name, layer in layers.items():
        yield name, round_to_grid(layer.weight.detach(), grid, symmetric, clip)
