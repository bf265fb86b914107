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
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from methods.kernels.grid import Grid, QuantizedWeight


def round_to_grid(weight: Tensor, grid: Grid, symmetric: bool = True) -> QuantizedWeight:
    """Quantize a weight matrix [out, in] of the model's dtype."""
    import torch

    from methods.kernels.grid import QuantizedWeight

    steps, half = 2**grid.bits - 1, 2 ** (grid.bits - 1)
    groups = weight.float().unflatten(1, (-1, grid.group_size or weight.shape[1]))
    low, high = groups.amin(-1), groups.amax(-1)
    if symmetric:
        span, offsets = 2 * torch.maximum(-low, high), None
    else:
        span = high - low
    scales = (span / steps).to(weight.dtype)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    if not symmetric:
        offsets = (low + half * scales.float()).to(weight.dtype)
        groups = groups - offsets.float().unsqueeze(-1)
    codes = (groups / scales.float().unsqueeze(-1)).round().clamp(-half, half - 1).flatten(1)
    codes = codes.to(torch.int8) if grid.bits == 8 else (codes + half).to(torch.uint8)
    return QuantizedWeight(grid, codes, scales, offsets)


def round_head(model: PreTrainedModel, bits: Literal[4, 8] | None) -> Iterator[tuple[str, QuantizedWeight]]:
    """The output head to nearest, symmetric: 8 bits with one scale a row, 4 bits with one for 32 inputs; nothing without `bits`.

    A head that shares its weight with the input embedding takes it along.
    """
    from methods.kernels.grid import Grid

    head = model.get_output_embeddings()
    if bits is not None:
        name = next(name for name, module in model.named_modules() if module is head)
        yield name, round_to_grid(head.weight.detach(), Grid(bits, 32 if bits == 4 else None))


def round_layers(layers: dict[str, nn.Linear], grid: Grid, symmetric: bool = True) -> Iterator[tuple[str, QuantizedWeight]]:
    """Quantize layers one at a time."""
    for name, layer in layers.items():
        yield name, round_to_grid(layer.weight.detach(), grid, symmetric)
