# mypy: disable-error-code="no-untyped-def, assignment"
"""Products with 2:4 sparse weights, of each four consecutive inputs at most two: kept as numbers, or as 4-bit codes.

Outputs and inputs form tiles and units of 32, and the 32 rows of a tile stand in the order g, r, as in
`methods.kernels.triton.layout`. A row of a unit keeps 16 weights; the n-th belongs to input 4 · (n // 2) + position:

    positions  int32 [tiles, units, 32], the n-th position in bits 2n and 2n + 1
    values     model dtype [tiles, units, 16, 32], the kept weights;
               or int32 [tiles, units, 2, 32], their codes: the n-th in bits 4 · (n % 8) of word n // 8, w = (code - 8) · scale
    scales     [tiles, groups, 32]; None where values are weights

So 16-bit weights take 9 bits instead of 16, and 4-bit codes 3 instead of 4. The kernel is for few rows of inputs, where a product is
limited by these bytes; for many, a dense product of `dense` is no slower. Two inputs of a row are gathered for each four, from the
first-level cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from slimbench.methods.kernels.grid import Grid, QuantizedWeight
from slimbench.methods.kernels.triton.layout import ROWS, UNIT, fits, pack_steps, unpack_steps

_TILE = tl.constexpr(ROWS)
_UNIT = tl.constexpr(UNIT)
_KEPT = tl.constexpr(UNIT // 2)
_CODE_OF_ZERO = 8
_BLOCK_UNITS, _WARPS = 32, 8  # so that a lane has one unit of four rows


@dataclass(frozen=True)
class Sparse24:
    """A 2:4 sparse weight [outputs, inputs] in the layout of this module."""

    positions: Tensor
    values: Tensor
    scales: Tensor | None
    outputs: int

    @property
    def inputs(self) -> int:
        return self.positions.shape[1] * UNIT

    def dense(self) -> Tensor:
        """The weights [outputs, inputs] in the model's dtype."""
        return self._spread(self.values, 0) if self.scales is None else self.codes(Grid(4)).dequantize()

    def codes(self, grid: Grid) -> QuantizedWeight:
        """The weight on its 4-bit grid.

        Raises:
            ValueError: It holds numbers, not codes.
        """
        if self.scales is None:
            raise ValueError("the weight is not on a grid")
        shifts = 4 * torch.arange(8, device=self.values.device)[:, None]
        kept = (self.values[:, :, :, None, :] >> shifts & 15).flatten(2, 3)
        return QuantizedWeight(
            grid, self._spread(kept, _CODE_OF_ZERO).to(torch.uint8), unpack_steps(self.scales)[: self.outputs].contiguous()
        )

    def _spread(self, kept: Tensor, zero: int) -> Tensor:
        """What is kept [tiles, units, 16, 32] at its places in a matrix [outputs, inputs], and `zero` elsewhere."""
        tiles, units = self.positions.shape[:2]
        place = torch.arange(UNIT // 2, device=kept.device)[:, None]
        position = 4 * (place // 2) + (self.positions[:, :, None, :] >> 2 * place & 3)
        spread = torch.full((tiles, units, UNIT, ROWS), zero, dtype=kept.dtype, device=kept.device).scatter_(2, position.long(), kept)
        return unpack_steps(spread.flatten(1, 2))[: self.outputs].contiguous()


def compress(weight: Tensor) -> Sparse24:
    """Keep two weights of each four.

    Args:
        weight: [out, in] in a floating dtype, in a multiple of 32.

    Raises:
        ValueError: More than two of some four weights are not zero, or the inputs are no whole units.
    """
    positions, kept = _keep(weight, 0)
    return Sparse24(positions, kept.contiguous(), None, len(weight))


def compress_codes(weight: QuantizedWeight) -> Sparse24:
    """Keep two codes of each four.

    Args:
        weight: On a symmetric 4-bit grid, where weights that are zero have the code 8; groups are whole units.

    Raises:
        ValueError: It has another grid, or more than two of some four weights are not zero.
    """
    if weight.grid.bits != 4 or not weight.symmetric or weight.outliers is not None or not fits(weight):
        raise ValueError(f"2:4 codes are on a symmetric 4-bit grid whose groups are multiples of {UNIT}, without outliers")
    positions, kept = _keep(weight.codes, _CODE_OF_ZERO)
    codes = kept.long().unflatten(2, (2, 8)) << 4 * torch.arange(8, device=kept.device)[:, None]
    return Sparse24(positions, _joined(codes), pack_steps(weight.scales), len(weight.codes))


def _keep(matrix: Tensor, zero: int) -> tuple[Tensor, Tensor]:
    """The positions of what is kept of a matrix [out, in], and what is kept of it: [tiles, units, 16, 32]."""
    if matrix.shape[1] % UNIT:
        raise ValueError(f"{matrix.shape[1]} inputs are no whole units of {UNIT}")
    fours = matrix.unflatten(1, (-1, 4))
    there = fours != zero
    if (there.sum(-1) > 2).any():
        raise ValueError("the weight is not 2:4 sparse: more than two of four consecutive inputs are not zero")
    position = there.int().argsort(dim=-1, descending=True, stable=True)[..., :2].sort(-1).values
    shifts = 2 * torch.arange(UNIT // 2, device=matrix.device)[:, None]
    positions = _joined(_by_tile(position.flatten(1), UNIT // 2) << shifts)
    return positions, _by_tile(fours.gather(2, position).flatten(1), UNIT // 2)


def _by_tile(matrix: Tensor, size: int) -> Tensor:
    """[out, units · size] as [tiles, units, size, 32]; missing rows are zeros."""
    return pack_steps(matrix).unflatten(1, (-1, size))


def _joined(fields: Tensor) -> Tensor:
    """Words from int64 fields that share no bit, over the last but one dimension, as int32."""
    words = fields.sum(-2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


@triton.jit
def _sparse_row(
    x,
    positions,
    values,
    scales,
    y,
    outputs,
    units,
    units_per_group,
    CODES: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """y [rows, outputs]; program: tile of outputs, row of inputs."""
    tile = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    place = tl.arange(0, _TILE)[None, :]
    inputs = units * _UNIT
    total = tl.zeros([BLOCK_UNITS, _TILE], dtype=tl.float32)
    for begin in range(0, units, BLOCK_UNITS):
        unit = begin + tl.arange(0, BLOCK_UNITS)
        inside = (unit < units)[:, None]
        block = (tile * units + unit)[:, None]
        position = tl.load(positions + block * _TILE + place, mask=inside, other=0)
        products = tl.zeros([BLOCK_UNITS, _TILE], dtype=tl.float32)
        for n in tl.static_range(_KEPT):
            column = unit[:, None] * _UNIT + n // 2 * 4 + (position >> 2 * n & 3)
            value = tl.load(x + row * inputs + column, mask=inside, other=0.0).to(tl.float32)
            if CODES:
                if n % 8 == 0:
                    word = tl.load(values + (block * 2 + n // 8) * _TILE + place, mask=inside, other=0)
                kept = (word >> n % 8 * 4 & 15).to(tl.float32) - 8.0
            else:
                kept = tl.load(values + (block * _KEPT + n) * _TILE + place, mask=inside, other=0.0).to(tl.float32)
            products += kept * value
        if CODES:
            group = (tile * (units // units_per_group) + unit // units_per_group)[:, None]
            products *= tl.load(scales + group * _TILE + place, mask=inside, other=0.0).to(tl.float32)
        total += products
    sums = tl.sum(total, axis=0)
    place = tl.arange(0, _TILE)
    output = tile * _TILE + place // 4 + place % 4 * 8
    tl.store(y + row.to(tl.int64) * outputs + output, sums.to(y.dtype.element_ty), mask=output < outputs)


def product(x: Tensor, weight: Sparse24) -> Tensor:
    """Multiply few rows of inputs [rows, in] (contiguous, of the weight's dtype) with a sparse weight: [rows, out] in that dtype.

    Raises:
        ValueError: The weight has another number of inputs.
    """
    rows, inputs = x.shape
    if inputs != weight.inputs:
        raise ValueError(f"x has {inputs} inputs, the weight {weight.inputs}")
    y = torch.empty(rows, weight.outputs, dtype=x.dtype, device=x.device)
    if rows:
        tiles, units = weight.positions.shape[:2]
        codes = weight.scales is not None
        scales = weight.values if weight.scales is None else weight.scales
        group = units // weight.scales.shape[1] if weight.scales is not None else units
        tensors = (x, weight.positions, weight.values, scales, y)
        _sparse_row[(tiles, rows)](*tensors, weight.outputs, units, group, codes, _BLOCK_UNITS, num_warps=_WARPS)
    return y


def reference(x: Tensor, weight: Sparse24) -> Tensor:
    """What `product` computes, by torch."""
    return nn.functional.linear(x, weight.dense())
