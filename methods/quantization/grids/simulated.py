"""Rounding of weights to formats that no packed grid has: numbers on the grid, kept in the model's dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slimbench.methods.kernels.numbers import ActivationGrid


def round_weights(layers: dict[str, nn.Linear], grid: ActivationGrid) -> None:
    """Round the weights [out, in] of layers to nearest, in place; a "token" of the grid is a row.

    The scale of the tensor that goes with `e4m3` scales of groups is that of the whole weight.
    """
    import torch

    from slimbench.methods.kernels.numbers import fake_quantize

    with torch.no_grad():
        for layer in layers.values():
            whole = tensor_scale(layer.weight.abs().amax().float(), grid) if grid.scale_format == "e4m3" else None
            layer.weight.copy_(fake_quantize(layer.weight, grid, whole))


def tensor_scale(largest: Tensor, grid: ActivationGrid) -> Tensor:
    """The scale of a tensor with its largest magnitude: the largest e4m3 scale of a group then meets it."""
    from slimbench.methods.kernels.numbers import FLOATS

    return largest.clamp_min(1e-30) / (grid.largest * FLOATS["e4m3"].largest)
