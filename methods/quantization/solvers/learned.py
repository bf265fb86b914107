"""Linear layers that learn how their weights are rounded while what the weights stand for is given.

Roundings pass gradients as if they were not there. Grids are those of the packed format: w = (q - mid) · s + o for each group, with
s and o rounded to the dtype in which they are stored before they are used.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from slimbench.methods.kernels.grid import Grid, QuantizedWeight
from slimbench.methods.kernels.rounding import fit_groups, round_to_grid
from slimbench.methods.quantization.grids.trained_layers import GridLinear, expanded, rounded

_STRETCH = (-0.1, 1.1)
_WARM = 0.2
_BETA = (20.0, 2.0)


class LearnedLinear(GridLinear):
    """Keeps the dense weight, in float32 groups [out, groups, n], and learns other numbers beside it."""

    groups: Tensor

    def __init__(self, source: nn.Linear, grid: Grid) -> None:
        super().__init__(source, grid, source.weight.dtype)
        self.register_buffer("groups", source.weight.detach().float().unflatten(1, (-1, grid.group_size or source.in_features)))

    @abstractmethod
    def learned(self) -> Iterator[tuple[nn.Parameter, float]]:
        """What is learned, and its learning rate as a multiple of the common one."""

    def penalty(self, done: float) -> Tensor | float:
        """Added to the loss after a fraction `done` of the steps."""
        return 0.0

    def original(self) -> Tensor:
        """The dense weight [out, in] in its dtype."""
        return self.groups.flatten(1).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply inputs [..., in] of the model's dtype; the result is [..., out]."""
        return nn.functional.linear(x, self.effective().to(x.dtype), self.bias)


class ClippedLinear(LearnedLinear):
    """Learns for each group which fractions of its largest and smallest weight bound the grid (learnable weight clipping).

    h = (γ max w - β min w) / (2^b - 1), z = -⌊β min w / h⌉, q = clip(⌊w / h⌉ + z, 0, 2^b - 1); γ, β are sigmoids, near one at first.
    On a symmetric grid h = 2 max(γ max w, -β min w) / (2^b - 1), and z is the middle code.
    """

    START = 4.0

    def __init__(self, source: nn.Linear, grid: Grid, symmetric: bool = False) -> None:
        super().__init__(source, grid)
        self.symmetric = symmetric
        self.upper = nn.Parameter(torch.full(self.groups.shape[:2], self.START, device=self.groups.device))
        self.lower = nn.Parameter(self.upper.detach().clone())

    def learned(self) -> Iterator[tuple[nn.Parameter, float]]:
        yield from ((self.upper, 1.0), (self.lower, 1.0))

    def effective(self) -> Tensor:
        codes, scales, offsets = self._codes()
        return expanded(codes, self.grid, scales, offsets, self.dtype)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        codes, scales, offsets = self._codes()
        kept = None if offsets is None else offsets.to(self.dtype)
        return QuantizedWeight(self.grid, codes.to(torch.uint8), scales.to(self.dtype), kept)

    def _codes(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes [out, in], whole but with gradients, scales and offsets [out, groups]."""
        levels = 2**self.grid.bits - 1
        low, high = self.lower.sigmoid() * self.groups.amin(-1), self.upper.sigmoid() * self.groups.amax(-1)
        span = 2 * torch.maximum(high, -low) if self.symmetric else high - low
        scales = rounded((span / levels).clamp_min(torch.finfo(self.dtype).tiny), self.dtype)
        zeros = torch.full_like(scales, self.grid.mid) if self.symmetric else nearest(-low / scales)
        codes = (nearest(self.groups / scales.unsqueeze(-1)) + zeros.unsqueeze(-1)).clamp(0, levels)
        return codes.flatten(1), scales, None if self.symmetric else (self.grid.mid - zeros) * scales


class UpOrDownLinear(LearnedLinear):
    """Learns for each weight whether it is rounded up or down.

    w̃ = s · clip(⌊w / s⌋ + h(v)) with the rectified sigmoid h(v) = clip(σ(v) (ζ - γ) + γ, 0, 1), ζ = 1.1, γ = -0.1, which is w at first.
    The penalty λ · mean(1 - |2 h - 1|^β) drives h to 0 or 1 as β falls from 20 to 2; it begins after a fifth of the steps.

    Args:
        penalty: λ.
    """

    floors: Tensor
    scales: Tensor
    offsets: Tensor | None

    def __init__(self, source: nn.Linear, grid: Grid, symmetric: bool, penalty: float) -> None:
        super().__init__(source, grid)
        self.weight_of_penalty = penalty
        scales, offsets = fit_groups(self.groups, grid.bits, self.dtype, symmetric, clip=True)
        steps = self.groups if offsets is None else self.groups - offsets.float().unsqueeze(-1)
        steps = (steps / scales.float().unsqueeze(-1)).flatten(1)
        self.register_buffer("floors", steps.floor())
        self.register_buffer("scales", scales)
        self.register_buffer("offsets", offsets)
        low, high = _STRETCH
        self.v = nn.Parameter(torch.logit((steps - steps.floor() - low) / (high - low)))

    def learned(self) -> Iterator[tuple[nn.Parameter, float]]:
        yield self.v, 1.0

    def up(self) -> Tensor:
        """h, by how much of a step each weight is rounded up, [out, in]."""
        low, high = _STRETCH
        return (self.v.sigmoid() * (high - low) + low).clamp(0, 1)

    def effective(self) -> Tensor:
        return expanded(self._inside(self.floors + self.up()), self.grid, self.scales.float(), self._offsets(), self.dtype)

    def penalty(self, done: float) -> Tensor | float:
        if done < _WARM:
            return 0.0
        first, last = _BETA
        beta = last + (first - last) * 0.5 * (1 + math.cos(math.pi * (done - _WARM) / (1 - _WARM)))
        return self.weight_of_penalty * (1 - (2 * self.up() - 1).abs().pow(beta)).mean()

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        codes = self._inside(self.floors + (self.v >= 0)).to(torch.uint8)
        return QuantizedWeight(self.grid, codes, self.scales, self.offsets)

    def _offsets(self) -> Tensor | None:
        return None if self.offsets is None else self.offsets.float()

    def _inside(self, steps: Tensor) -> Tensor:
        """Codes from steps away from the middle of the grid."""
        return (steps + self.grid.mid).clamp(0, 2**self.grid.bits - 1)


class DividedLinear(LearnedLinear):
    """Learns what each weight is divided by before it is rounded: w̃ = s₁ · clip(⌊w / (s₁ S₂ s₃)⌉).

    s₁ is the scale of a group, S₂ has an entry for each weight and s₃ one for each output. All are exponentials of what is learned,
    so they stay positive; S₂ and s₃ are one at first. The offset of an asymmetric grid is subtracted before and stays as it is.
    """

    offsets: Tensor | None

    def __init__(self, source: nn.Linear, grid: Grid, symmetric: bool) -> None:
        super().__init__(source, grid)
        scales, offsets = fit_groups(self.groups, grid.bits, self.dtype, symmetric, clip=True)
        self.register_buffer("offsets", offsets)
        self.log_scales = nn.Parameter(scales.float().log())
        self.log_weights = nn.Parameter(torch.zeros_like(self.groups))
        self.log_rows = nn.Parameter(torch.zeros(len(self.groups), 1, 1, device=self.groups.device))

    def learned(self) -> Iterator[tuple[nn.Parameter, float]]:
        yield from ((self.log_scales, 1.0), (self.log_weights, 1.0), (self.log_rows, 1.0))

    def effective(self) -> Tensor:
        codes, scales = self._codes()
        return expanded(codes, self.grid, scales, None if self.offsets is None else self.offsets.float(), self.dtype)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        codes, scales = self._codes()
        return QuantizedWeight(self.grid, codes.to(torch.uint8), scales.to(self.dtype), self.offsets)

    def _codes(self) -> tuple[Tensor, Tensor]:
        scales = rounded(self.log_scales.exp(), self.dtype)
        shifted = self.groups if self.offsets is None else self.groups - self.offsets.float().unsqueeze(-1)
        divided = shifted / scales.unsqueeze(-1) * (-self.log_weights - self.log_rows).exp()
        return (nearest(divided) + self.grid.mid).clamp(0, 2**self.grid.bits - 1).flatten(1), scales


class DistilledLinear(LearnedLinear):
    """Learns the weight itself, which is rounded to nearest in each step, its grid fitted anew."""

    def __init__(self, source: nn.Linear, grid: Grid, symmetric: bool) -> None:
        super().__init__(source, grid)
        self.symmetric = symmetric
        self.weight = nn.Parameter(self.groups.flatten(1).clone())

    def learned(self) -> Iterator[tuple[nn.Parameter, float]]:
        yield self.weight, 1.0

    def effective(self) -> Tensor:
        return self.weight + (self.quantized().dequantize().float() - self.weight).detach()

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        return round_to_grid(self.weight.detach().to(self.dtype), self.grid, self.symmetric)


def nearest(x: Tensor) -> Tensor:
    """Whole numbers, straight-through."""
    return x + (x.round() - x).detach()
