"""Products of inputs with weights in the layout of `methods.kernels.triton.layout`, written in Triton.

    few rows   one program for a tile of 32 outputs; its warps share the inputs. A word is read once, its codes are
               made float32 and multiplied by up to four rows.
    more rows  tiles of outputs are dequantized to the dtype of the inputs and multiplied by the tensor cores.

On a card, block sizes come from Triton's autotuner: once for each shape, and kept on disk. The interpreter has no clock to tune
by, and takes fixed ones. Needs `triton`; import it only where that is there.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimbench.methods.kernels.triton.layout import ROWS, UNIT, WIDTHS

FEW_ROWS = 4
_MOST_ROWS_OF_A_BLOCK = 128

_TILE = tl.constexpr(ROWS)
_UNIT = tl.constexpr(UNIT)
_MAGIC = tl.constexpr(0x4B000000)  # the bits of 2^23 as a float32: with an integer below 2^23 in its place, the mantissa counts ones
_TWO_23 = tl.constexpr(8388608.0)

FEW_SIZES = [
    triton.Config({"BLOCK_UNITS": units}, num_warps=warps) for units, warps in ((4, 2), (4, 4), (8, 4), (16, 4), (8, 8), (16, 8), (32, 8))
]
MANY_SIZES = [
    triton.Config({"TILES": tiles, "UNITS": units}, num_warps=warps, num_stages=stages)
    for tiles, units, warps, stages in (
        (1, 2, 4, 4),
        (1, 4, 4, 3),
        (2, 1, 4, 4),
        (2, 2, 4, 3),
        (2, 4, 4, 2),
        (4, 1, 4, 3),
        (4, 2, 4, 3),
        (4, 2, 8, 3),
        (8, 1, 8, 3),
    )
]


@triton.jit
def _split(words, index, WIDTH: tl.constexpr, MIDDLE: tl.constexpr):
    """One code of each word, minus MIDDLE, in float32. `index`: which of the 32 / WIDTH inputs; a number or a tensor."""
    field = words >> (index // 2 * WIDTH + index % 2 * 16) & (1 << WIDTH) - 1
    return (field | _MAGIC).to(tl.float32, bitcast=True) - (_TWO_23 + MIDDLE)


@triton.jit
def _sums_of_plane(
    x,
    words,
    scales,
    offsets,
    tile,
    units,
    units_per_group,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BEFORE: tl.constexpr,
    MIDDLE: tl.constexpr,
    BITS: tl.constexpr,
    OFFSETS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """What a plane contributes to a tile of outputs: for each row, float32 [8 g, 4 r].

    Everything has the shape of the words, [units, 8 · WIDTH, 4], or lacks its last axis: so all stays in the registers that the
    words were read into, and an input is read once for the four weights that it meets there.
    """
    inputs, groups = units * _UNIT, units // units_per_group
    lane = tl.arange(0, 8 * WIDTH)
    line, word = lane // WIDTH, lane % WIDTH
    place = tl.arange(0, 4)[None, None, :]
    totals = ()
    for _ in tl.static_range(ROWS):
        totals = totals + (tl.zeros([BLOCK_UNITS, 8 * WIDTH, 4], dtype=tl.float32),)  # noqa: RUF005
    for begin in range(0, units, BLOCK_UNITS):
        unit = begin + tl.arange(0, BLOCK_UNITS)
        inside = (unit < units)[:, None, None]
        block = (tile * units + unit)[:, None, None] * (_TILE * BITS) + _TILE * BEFORE
        codes = tl.load(words + block + lane[None, :, None] * 4 + place, mask=inside, other=0)
        step = (tile * groups + unit // units_per_group)[:, None, None] * _TILE + line[None, :, None] * 4 + place
        scale = tl.load(scales + step, mask=inside, other=0.0).to(tl.float32) * (1 << BEFORE)
        if OFFSETS:
            offset = tl.load(offsets + step, mask=inside, other=0.0).to(tl.float32)
        first = unit[:, None] * _UNIT + word[None, :] * (_UNIT // WIDTH)
        added = ()
        for row in tl.static_range(ROWS):
            products = tl.zeros([BLOCK_UNITS, 8 * WIDTH, 4], dtype=tl.float32)
            sums = tl.zeros([BLOCK_UNITS, 8 * WIDTH], dtype=tl.float32)
            for index in tl.static_range(_UNIT // WIDTH):
                value = tl.load(x + row * inputs + first + index, mask=(unit < units)[:, None], other=0.0).to(tl.float32)
                products += _split(codes, index, WIDTH, MIDDLE) * value[:, :, None]
                sums += value
            products *= scale
            if OFFSETS:
                products += sums[:, :, None] * offset
            added = added + (totals[row] + products,)  # noqa: RUF005
        totals = added
    found = ()
    for row in tl.static_range(ROWS):
        found = found + (tl.sum(tl.reshape(tl.sum(totals[row], axis=0), [8, WIDTH, 4]), axis=1),)  # noqa: RUF005
    return found


@triton.jit
def _few_rows(
    x,
    words,
    scales,
    offsets,
    y,
    outputs,
    units,
    units_per_group,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    OFFSETS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """y [ROWS, outputs]; program: tile of outputs. FIRST, SECOND: widths of the planes, 0 for none."""
    tile = tl.program_id(0).to(tl.int64)
    middle: tl.constexpr = 1 << BITS - 1 if SECOND == 0 else 0
    sums = _sums_of_plane(x, words, scales, offsets, tile, units, units_per_group, ROWS, FIRST, 0, middle, BITS, OFFSETS, BLOCK_UNITS)
    if SECOND > 0:
        more = _sums_of_plane(x, words, scales, offsets, tile, units, units_per_group, ROWS, SECOND, FIRST, 1, BITS, False, BLOCK_UNITS)
    output = tile * _TILE + tl.arange(0, 8)[:, None] + 8 * tl.arange(0, 4)[None, :]
    for row in tl.static_range(ROWS):
        total = sums[row] + more[row] if SECOND > 0 else sums[row]
        tl.store(y + row * outputs + output, total.to(y.dtype.element_ty), mask=output < outputs)


@triton.jit
def _tile_of_plane(
    words,
    scale,
    offset,
    tile,
    unit,
    units,
    WIDTH: tl.constexpr,
    BEFORE: tl.constexpr,
    MIDDLE: tl.constexpr,
    BITS: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    """What a plane contributes to the weights of some tiles and units: float32 [32 · tiles, 32 · units].

    `scale` and `offset` are [tiles, units, 8 g, 1, 4 r, 1], in the order in which they and the words lie in memory.
    """
    block = (tile[:, None] * units + unit[None, :]) * (_TILE * BITS) + _TILE * BEFORE
    lane = tl.arange(0, 8)[:, None, None] * (4 * WIDTH) + tl.arange(0, WIDTH)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    inside = (unit < units)[None, :, None, None, None]
    packed = tl.load(words + block[:, :, None, None, None] + lane[None, None, :, :, :], mask=inside, other=0)
    weight = _split(packed[:, :, :, :, :, None], tl.arange(0, _UNIT // WIDTH), WIDTH, MIDDLE) * (1 << BEFORE) * scale
    if OFFSETS:
        weight += offset
    return tl.reshape(tl.permute(weight, (0, 4, 2, 1, 3, 5)), [tile.shape[0] * _TILE, unit.shape[0] * _UNIT])


@triton.jit
def _steps_of_tile(steps, tile, unit, units, units_per_group):
    """Scales or offsets of some tiles and units, float32 [tiles, units, 8 g, 1, 4 r, 1]."""
    place = tl.arange(0, 8)[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]
    group = tile[:, None] * (units // units_per_group) + unit[None, :] // units_per_group
    inside = (unit < units)[None, :, None, None, None]
    found = tl.load(steps + group[:, :, None, None, None] * _TILE + place, mask=inside, other=0.0)
    return found.to(tl.float32)[:, :, :, :, :, None]


@triton.jit
def _many_rows(
    x,
    words,
    scales,
    offsets,
    y,
    outputs,
    units,
    units_per_group,
    rows,
    BITS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    OFFSETS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILES: tl.constexpr,
    UNITS: tl.constexpr,
):
    """y [rows, outputs]; program: block of rows (so that those that run together share weights), block of TILES tiles of outputs."""
    inputs, tiles = units * _UNIT, (outputs + _TILE - 1) // _TILE
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first = tl.program_id(1).to(tl.int64) * TILES
    tile = tl.minimum(first + tl.arange(0, TILES), tiles - 1)  # those beyond the last are computed and not stored
    middle: tl.constexpr = 1 << BITS - 1 if SECOND == 0 else 0
    sums = tl.zeros([TILES * _TILE, BLOCK_ROWS], dtype=tl.float32)
    unit = tl.arange(0, UNITS)
    next_scale = _steps_of_tile(scales, tile, unit, units, units_per_group)
    next_offset = _steps_of_tile(offsets, tile, unit, units, units_per_group) if OFFSETS else next_scale
    for begin in range(0, units, UNITS):
        unit = begin + tl.arange(0, UNITS)
        scale, offset = next_scale, next_offset
        next_scale = _steps_of_tile(scales, tile, unit + UNITS, units, units_per_group)  # too narrow for Triton to read them ahead
        next_offset = _steps_of_tile(offsets, tile, unit + UNITS, units, units_per_group) if OFFSETS else next_scale
        weight = _tile_of_plane(words, scale, offset, tile, unit, units, FIRST, 0, middle, BITS, OFFSETS)
        if SECOND > 0:
            weight += _tile_of_plane(words, scale, offset, tile, unit, units, SECOND, FIRST, 1, BITS, False)
        column = begin * _UNIT + tl.arange(0, UNITS * _UNIT)
        given = (column < inputs)[:, None] & (row < rows)[None, :]
        values = tl.load(x + row[None, :].to(tl.int64) * inputs + column[:, None], mask=given, other=0.0)
        sums = tl.dot(weight.to(x.dtype.element_ty), values, sums, input_precision="ieee")
    output = first * _TILE + tl.arange(0, TILES * _TILE)
    at = row[None, :].to(tl.int64) * outputs + output[:, None]
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=(row < rows)[None, :] & (output < outputs)[:, None])


def product(x: Tensor, words: Tensor, scales: Tensor, offsets: Tensor | None, bits: int, outputs: int) -> Tensor:
    """Multiply inputs with a packed weight.

    Args:
        x: [rows, in], contiguous, float16, bfloat16 or float32.
        words: int32 [tiles, units, 32 · bits].
        scales: [tiles, groups, 32] in a floating dtype; offsets likewise.
        bits: Of a code: 2, 3, 4 or 8.
        outputs: Rows of the weight; the last tile may have more.

    Returns:
        [rows, outputs] in the dtype of x.

    Raises:
        ValueError: The shapes do not belong together.
    """
    rows, inputs = x.shape
    tiles, units, width = words.shape
    groups = scales.shape[1]
    if units * UNIT != inputs or width != ROWS * bits or tiles != triton.cdiv(outputs, ROWS) or units % groups:
        raise ValueError(f"words {list(words.shape)} and {groups} groups are no {bits}-bit weight [{outputs}, {inputs}]")
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if rows == 0:
        return y
    first, second = (*WIDTHS[bits], 0)[:2]
    few, many = _kernels()
    arguments = (x, words, scales, scales if offsets is None else offsets, y, outputs, units, units // groups, rows)
    grid = (bits, first, second, offsets is not None)
    if rows <= FEW_ROWS:
        few((tiles,), *arguments, *grid)
        return y
    block = min(_MOST_ROWS_OF_A_BLOCK, max(16, triton.next_power_of_2(rows)))
    many(lambda chosen: (triton.cdiv(rows, block), triton.cdiv(tiles, chosen["TILES"])), *arguments, *grid, block)
    return y


@functools.cache
def _kernels() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two kernels with their block sizes: tuned on a card, fixed in the interpreter."""
    if triton.knobs.runtime.interpret:
        return _fixed(_few_rows, BLOCK_UNITS=8), _fixed(_many_rows, TILES=2, UNITS=2)
    shape = ["outputs", "units", "units_per_group", "BITS", "OFFSETS"]
    return _tuned(_few_rows, FEW_SIZES, [*shape, "ROWS"]), _tuned(
        _many_rows, MANY_SIZES, [*shape, "BLOCK_ROWS"], {"early_config_prune": _worth_compiling}
    )


def _fixed(kernel: Any, **sizes: int) -> Callable[..., Any]:
    return lambda grid, *arguments: kernel[grid](*arguments, **sizes)


def _tuned(kernel: Any, configs: list[Any], key: list[str], prune: dict[str, Any] | None = None) -> Callable[..., Any]:
    tuned = triton.autotune(configs, key, prune_configs_by=prune, cache_results=True)(kernel)
    return lambda grid, *arguments: tuned[grid](*arguments)


def _worth_compiling(configs: list[Any], arguments: dict[str, Any], **_: Any) -> list[Any]:
    """Without tensor cores a product unrolls into code that takes many seconds to compile: float32 makes do with the first two."""
    return configs[:2] if arguments["x"].dtype is torch.float32 else configs
