"""The grid of a quantized weight, and its codes as they lie on disk.

A weight `w[o, i]` is a code `q`, an integer or an e4m3 number, on a grid that it shares with its group of inputs, plus what is kept
apart from the grid:

    w = (q - mid) * scale + offset + outlier        mid = 2^(bits - 1), 0 for 8 bits; no offset on a symmetric grid

and the whole matrix may have a product of two thin ones added to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

GROUP_SIZES = (32, 64, 128, 256)
BITS = (2, 3, 4, 8)

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (8,), 10: (8, 2), 12: (8, 4), 16: (8, 8)}
"""Widths of the fields that a code is split into, the lowest bits first."""


@dataclass(frozen=True)
class Grid:
    """How the weights of a layer are laid out.

    Attributes:
        bits: Of a code.
        group_size: Inputs that share a scale; None: a row.
        activation_bits: Bits to which inputs are rounded, each token by its largest magnitude; None: they keep their dtype.
        number: What a code is, and a rounded input: an integer, or a floating-point number with 4 bits of exponent and 3 of mantissa.
    """

    bits: Literal[2, 3, 4, 8]
    group_size: int | None = None
    activation_bits: Literal[8] | None = None
    number: Literal["int", "e4m3"] = "int"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {BITS}, not {self.bits!r}")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size must be one of {GROUP_SIZES} or None, not {self.group_size!r}")
        if self.activation_bits not in (None, 8) or (self.activation_bits and (self.bits != 8 or self.group_size)):
            raise ValueError("8-bit activations go with 8-bit weights that have one scale a row")
        if self.number not in ("int", "e4m3") or (self.number == "e4m3" and (self.bits != 8 or self.group_size)):
            raise ValueError(f"a code is an integer, or e4m3 with 8 bits and one scale a row, not {self.number!r}")

    @property
    def mid(self) -> int:
        """The code of a weight 0 on a symmetric grid."""
        return 0 if self.bits == 8 else 2 ** (self.bits - 1)


@dataclass(frozen=True)
class Outliers:
    """Weights kept apart from the grid and added to it, by rows.

    Attributes:
        starts: int32 [out + 1]; those of row o are starts[o] .. starts[o + 1] - 1.
        columns: int32 [n].
        values: [n] in the model's dtype.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor

    @property
    def rows(self) -> Tensor:
        """The row of each one, int64 [n]."""
        counts = self.starts.diff().long()
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=len(self.columns))

    @classmethod
    def of(cls, weight: Tensor, mask: Tensor) -> Outliers:
        """The weights under a boolean mask, both [out, in]."""
        starts = nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        return cls(starts.int(), mask.nonzero()[:, 1].int(), weight[mask])

    def parts(self) -> dict[str, Tensor]:
        """The tensors by the names under which they are stored."""
        return {f"outlier_{part}": tensor for part, tensor in vars(self).items()}

    @classmethod
    def from_parts(cls, parts: dict[str, Tensor]) -> Outliers | None:
        """From stored tensors; None where there are none."""
        return cls(*(parts[f"outlier_{part}"] for part in ("starts", "columns", "values"))) if "outlier_values" in parts else None


@dataclass(frozen=True)
class LowRank:
    """A product of two thin matrices that is added to the grid: `expand @ reduce`.

    Attributes:
        reduce: [rank, in] in the model's dtype.
        expand: [out, rank] in the model's dtype.
    """

    reduce: Tensor
    expand: Tensor

    def parts(self) -> dict[str, Tensor]:
        """The tensors by the names under which they are stored."""
        return {"low_rank_in": self.reduce, "low_rank_out": self.expand}

    @classmethod
    def from_parts(cls, parts: dict[str, Tensor]) -> LowRank | None:
        """From stored tensors; None where there are none."""
        return cls(parts["low_rank_in"], parts["low_rank_out"]) if "low_rank_in" in parts else None


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight matrix on its grid.

    Attributes:
        codes: [out, in], uint8 0..2^bits - 1, for 8 bits int8 or float8_e4m3fn.
        scales: [out, groups] in the model's dtype.
        offsets: [out, groups] in the model's dtype, None on a symmetric grid.
        outliers: What is added to single weights, None where nothing is.
        low_rank: What is added to the whole matrix, None where nothing is.
    """

    grid: Grid
    codes: Tensor
    scales: Tensor
    offsets: Tensor | None = None
    outliers: Outliers | None = None
    low_rank: LowRank | None = None

    def dequantize(self) -> Tensor:
        """The weights [out, in] in the model's dtype: computed in float32 and rounded once."""
        grouped = (self.codes.float() - self.grid.mid).unflatten(1, (self.scales.shape[1], -1))
        weight = grouped * self.scales.float().unsqueeze(-1)
        if self.offsets is not None:
            weight = weight + self.offsets.float().unsqueeze(-1)
        weight = weight.flatten(1)
        if self.outliers is not None:
            apart = self.outliers
            weight = weight.index_put((apart.rows, apart.columns.long()), apart.values.float(), accumulate=True)
        if self.low_rank is not None:
            weight = weight + self.low_rank.expand.float() @ self.low_rank.reduce.float()
        return weight.to(self.scales.dtype)

    def take(self, index: Tensor) -> QuantizedWeight:
        """Some rows of what lies on the grid, for an index [n]: without outliers and low rank."""
        return QuantizedWeight(self.grid, self.codes[index], self.scales[index], None if self.offsets is None else self.offsets[index])

    @property
    def symmetric(self) -> bool:
        return self.offsets is None

    def packed_codes(self) -> Tensor:
        """The codes as they are stored: 8 bits as they are, others as uint8 [out, in · bits / 8]."""
        return pack(self.codes, self.grid.bits)


def two_of_four(matrix: Tensor, zero: int = 0) -> bool:
    """Whether a matrix [out, in] has, of each four consecutive inputs, at most two that are not `zero`."""
    return matrix.shape[1] % 4 == 0 and not bool(((matrix.unflatten(1, (-1, 4)) != zero).sum(-1) > 2).any())


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [out, in] as uint8 [out, in · bits / 8]; 8-bit codes as they are.

    The planes of a row stand one after the other; of the codes that share a byte, the first has the highest bits.
    """
    if bits == 8:
        return codes
    return torch.cat([_join(field.to(torch.uint8), width) for field, width in fields(codes, bits)], dim=1)


def fields(codes: Tensor, bits: int) -> list[tuple[Tensor, int]]:
    """The planes of codes (unsigned, [out, in]) with their widths, the lowest bits first."""
    found, shift = [], 0
    for width in PLANES[bits]:
        found.append((codes >> shift & (1 << width) - 1, width))
        shift += width
    return found


def unpack(qweight: Tensor, bits: int, split: Callable[[Tensor, int], Tensor] | None = None) -> Tensor:
    """Codes [out, in] from their stored form: of its dtype up to 8 bits, int32 above.

    Args:
        split: Takes bytes [out, n] apart into their fields of a width, [out, n · 8 / width]; None: by shifting.
    """
    if bits == 8:
        return qweight
    split = split or _split
    codes, begin, shift = None, 0, 0
    for width in PLANES[bits]:
        end = begin + qweight.shape[1] * width // bits
        field = split(qweight[:, begin:end], width)
        field = (field if bits <= 8 else field.int()) << shift
        codes = field if codes is None else codes | field
        begin, shift = end, shift + width
    assert codes is not None
    return codes


def _join(field: Tensor, width: int) -> Tensor:
    parts = field.unflatten(1, (-1, 8 // width))
    byte = parts[..., 0]
    for index in range(1, 8 // width):
        byte = byte << width | parts[..., index]
    return byte


def _split(stored: Tensor, width: int) -> Tensor:
    shifts = range(8 - width, -1, -width)
    return torch.stack([stored >> shift & (1 << width) - 1 for shift in shifts], dim=-1).flatten(1)
