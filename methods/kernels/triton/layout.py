"""How a quantized weight lies in the memory of a GPU, for the Triton and the CUDA kernels alike.

Thirty-two outputs form a tile, thirty-two inputs a unit. A code of `bits` bits is split into planes (`WIDTHS`: 3 = 2 + 1); in a
plane of width W, a row of a unit is W int32 words of 32 / W consecutive inputs each. Words are ordered tile, unit, plane, g, word,
r, where 8 r + g is the row in the tile:

    words    int32 [tiles, units, 32 · bits]
    scales   [tiles, groups, 32], offsets likewise; in the order g, r too

So a warp reads 512 contiguous bytes of 4-bit codes, 16 bytes a lane: the codes of the same 8 inputs for rows g, g + 8, g + 16 and
g + 24. This is the fragment of a 16 × 16 tensor core operand, twice.
Input 2p + h of a word has the bits from W · p + 16 · h, so that pairs of inputs lie in the two halves of a word.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimbench.methods.kernels.grid import Grid, QuantizedWeight

ROWS = 32
UNIT = 32
WIDTHS = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""Widths of the planes of a code, the lowest bits first."""

_PLACES = 4  # r of a row
_LINES = 8  # g of a row


def fits(weight: QuantizedWeight) -> bool:
    """Whether the groups of a weight are whole units."""
    inputs, groups = weight.codes.shape[1], weight.scales.shape[1]
    return inputs % groups == 0 and inputs // groups % UNIT == 0


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [out, in] as words, int32 [tiles, units, 32 · bits]; missing rows of the last tile are zeros."""
    unsigned = codes.to(torch.int32) + (128 if bits == 8 else 0)
    filled = nn.functional.pad(unsigned, (0, 0, 0, -len(codes) % ROWS))
    planes, shift = [], 0
    for width in WIDTHS[bits]:
        field = filled >> shift & (1 << width) - 1
        split = field.view(-1, _PLACES, _LINES, codes.shape[1] // UNIT, width, UNIT // width)
        words = torch.zeros(split.shape[:-1], dtype=torch.int32, device=codes.device)
        for index in range(UNIT // width):
            words |= split[..., index] << _bit(index, width)
        planes.append(words.permute(0, 3, 2, 4, 1).flatten(2))
        shift += width
    return torch.cat(planes, dim=2).contiguous()


def unpack(words: Tensor, bits: int) -> Tensor:
    """Codes [32 · tiles, in] from their words."""
    tiles, units = words.shape[:2]
    codes, begin, shift = None, 0, 0
    for width in WIDTHS[bits]:
        plane = words[:, :, begin : begin + ROWS * width].view(tiles, units, _LINES, width, _PLACES, 1)
        bit = torch.tensor([_bit(index, width) for index in range(UNIT // width)], dtype=torch.int32, device=words.device)
        field = (plane >> bit & (1 << width) - 1).permute(0, 4, 2, 1, 3, 5).reshape(tiles * ROWS, units * UNIT)
        codes = field if codes is None else codes | field << shift
        begin, shift = begin + ROWS * width, shift + width
    assert codes is not None
    return (codes - 128).to(torch.int8) if bits == 8 else codes.to(torch.uint8)


def pack_steps(steps: Tensor) -> Tensor:
    """Scales or offsets [out, groups] as [tiles, groups, 32]."""
    filled = nn.functional.pad(steps, (0, 0, 0, -len(steps) % ROWS))
    return filled.view(-1, _PLACES, _LINES, steps.shape[1]).permute(0, 3, 2, 1).flatten(2).contiguous()


def unpack_steps(steps: Tensor) -> Tensor:
    """Scales or offsets [32 · tiles, groups] from [tiles, groups, 32]."""
    return steps.unflatten(2, (_LINES, _PLACES)).permute(0, 3, 2, 1).flatten(0, 2)


def prepare(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The buffers of a weight, by name."""
    kept = {"weight_packed": pack(weight.codes, weight.grid.bits), "scales": pack_steps(weight.scales)}
    return kept if weight.offsets is None else kept | {"offsets": pack_steps(weight.offsets)}


def restore(grid: Grid, words: Tensor, scales: Tensor, offsets: Tensor | None, rows: int) -> QuantizedWeight:
    """The first rows of a weight from its buffers, or from some tiles of them."""
    codes = unpack(words, grid.bits)[:rows].contiguous()
    moved = None if offsets is None else unpack_steps(offsets)[:rows].contiguous()
    return QuantizedWeight(grid, codes, unpack_steps(scales)[:rows].contiguous(), moved)


def _bit(index: int, width: int) -> int:
    """Where the code of an input begins in its word."""
    return index // 2 * width + 16 * (index % 2)
