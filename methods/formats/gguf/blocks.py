"""Weights as llama.cpp stores them: floats, and blocks of 32 codes with one float16 scale.

A grid that llama.cpp has too is taken over code by code, so that nothing is rounded but a scale that float16 cannot hold exactly:

    Q4_0   w = (q - 8) · d     q = 0..15, 16 bytes: code j in the low half of byte j, code j + 16 in its high half
    Q8_0   w = q · d           q = -128..127, one byte each
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from gguf import GGMLQuantizationType

from slimbench.methods.base import Unsupported

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from slimbench.methods.kernels.grid import Grid, QuantizedWeight

BLOCK = 32
_TYPES = {4: GGMLQuantizationType.Q4_0, 8: GGMLQuantizationType.Q8_0}
_HALF_ROUNDING = 2.0**-11


def block_type(name: str, grid: Grid, width: int, symmetric: bool, outliers: bool) -> GGMLQuantizationType:
    """The block type that holds every weight of a grid.

    Args:
        name: Of the layer, for the message.
        width: Inputs of the layer.
        symmetric: The grid has no offsets.
        outliers: Weights are kept apart from the grid.

    Raises:
        Unsupported: There is none.
    """
    group = grid.group_size or width
    reason = None
    if grid.number != "int":
        reason = f"there is none of {grid.number} numbers"
    elif grid.bits not in _TYPES:
        reason = f"there is none for {grid.bits} bits with a scale for each group of {group}"
    elif not symmetric:
        reason = "those with an offset round it to float16, which moves the grid"
    elif outliers:
        reason = "weights that are kept apart from the grid fit into none"
    elif group % BLOCK:
        reason = f"groups of {group} inputs do not consist of blocks of {BLOCK}"
    if reason:
        raise Unsupported(f"no llama.cpp block type holds {name} without loss: {reason}")
    return _TYPES[grid.bits]


def encode(name: str, weight: QuantizedWeight) -> NDArray[np.uint8]:
    """The blocks of a quantized weight, uint8 [out, in / 32 · bytes of a block].

    Raises:
        Unsupported: No block type holds it, see `block_type`, or float16 does not hold its scales.
    """
    rows, width = weight.codes.shape
    kind = block_type(name, weight.grid, width, weight.symmetric, weight.outliers is not None)
    scales = np.repeat(_half_scales(name, weight.scales), width // BLOCK // weight.scales.shape[1], axis=1)
    codes = weight.codes.cpu().numpy().reshape(rows, -1, BLOCK)
    if kind is GGMLQuantizationType.Q4_0:
        codes = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
    parts = scales[..., None].view(np.uint8), codes.view(np.uint8)
    return np.ascontiguousarray(np.concatenate(parts, axis=-1).reshape(rows, -1))


def floats(name: str, tensor: Tensor, kind: GGMLQuantizationType) -> NDArray[np.floating]:
    """A tensor as float32 or float16.

    Raises:
        Unsupported: A value is beyond the range of float16.
    """
    import torch

    if kind is GGMLQuantizationType.F32:
        return tensor.float().numpy()
    half = tensor.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise Unsupported(f"{name} has values that float16 does not hold, and llama.cpp's files keep weights in float16")
    return half.numpy()


def _half_scales(name: str, scales: Tensor) -> NDArray[np.float16]:
    """Scales in float16, at most its rounding (one part in 2048) away from what they were."""
    import torch

    half = scales.cpu().to(torch.float16)
    error = (half.float() - scales.cpu().float()).abs()
    if not bool((error <= _HALF_ROUNDING * scales.cpu().float().abs()).all()):
        raise Unsupported(f"no llama.cpp block type holds {name} without loss: float16 does not hold its scales")
    return half.numpy()
