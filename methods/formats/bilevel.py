"""Scales and zero points that are themselves rounded: the two levels of SpQR (arXiv 2306.03078), a part of the codebook format.

Each group of consecutive inputs of a row has a scale and a zero point. Those of `SPAN` consecutive rows, at the same inputs, form a group
of the second level: scales and zero points are each rounded to codes of a few bits from their smallest to their largest,

    scale[o, g] = step · code + lowest,    step and lowest of (g, o // SPAN)

and so are the zero points. A group of n inputs takes 2 · bits + 4 · 16 / SPAN bits beside its n codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimbench.methods.kernels.grid import pack, unpack

SPAN = 16
_PARTS = ("group_codes", "group_ranges")


@dataclass(frozen=True)
class Bilevel:
    """Scales and zero points [out, groups] of two levels.

    Attributes:
        codes: Those of scales and of zero points as they are stored, uint8 [2, groups, out · bits / 8].
        ranges: Step and lowest of scales and of zero points, [2, 2, groups, out / SPAN], in the dtype of the weights.
    """

    codes: Tensor
    ranges: Tensor

    @classmethod
    def of(cls, scales: Tensor, zeros: Tensor, bits: int, dtype: torch.dtype) -> Bilevel:
        """Round scales and zero points, float32 [out, groups] each, to `bits` bits.

        Raises:
            ValueError: Rows do not come in runs of `SPAN`.
        """
        if len(scales) % SPAN:
            raise ValueError(f"second-level groups of {SPAN} rows do not divide {len(scales)} outputs")
        values = torch.stack((scales.T, zeros.T)).unflatten(2, (-1, SPAN))
        lowest = values.amin(-1).to(dtype)
        step = ((values.amax(-1) - lowest.float()) / (2**bits - 1)).to(dtype)
        step = torch.where(step == 0, torch.ones_like(step), step)
        codes = ((values - lowest.float().unsqueeze(-1)) / step.float().unsqueeze(-1)).round().clamp(0, 2**bits - 1).to(torch.uint8)
        stored = pack(codes.flatten(2).flatten(0, 1), bits).to(torch.uint8).unflatten(0, (2, -1))
        return cls(stored.contiguous(), torch.stack((step, lowest), dim=1))

    @property
    def bits(self) -> int:
        """Of a code of the first level."""
        return self.codes.shape[2] * 8 // (self.ranges.shape[3] * SPAN)

    def expand(self) -> tuple[Tensor, Tensor]:
        """Scales and zero points, float32 [out, groups] each."""
        codes = unpack(self.codes.flatten(0, 1), self.bits).unflatten(0, self.codes.shape[:2]).float().unflatten(2, (-1, SPAN))
        step, lowest = self.ranges.float().unsqueeze(-1).unbind(1)
        scales, zeros = (codes * step + lowest).flatten(2).mT
        return scales, zeros

    def parts(self) -> dict[str, Tensor]:
        """The tensors as they are stored, by name."""
        return dict(zip(_PARTS, (self.codes, self.ranges), strict=True))

    @classmethod
    def from_parts(cls, parts: dict[str, Tensor]) -> Bilevel | None:
        """What `parts` took apart; None where there is nothing of it."""
        return cls(*(parts[name] for name in _PARTS)) if _PARTS[0] in parts else None

    @classmethod
    def joined(cls, groups: list[Bilevel]) -> Bilevel:
        """Those of several runs of groups, one after the other."""
        return cls(torch.cat([g.codes for g in groups], dim=1), torch.cat([g.ranges for g in groups], dim=2))
