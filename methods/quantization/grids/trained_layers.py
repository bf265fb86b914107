"""Linear layers whose weights lie on their grid while they are trained.

In the forward pass such a layer multiplies with exactly the weights that its artefact will hold, scales and offsets rounded to the
dtype in which they are stored. Roundings pass gradients as if they were not there (the straight-through estimator).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimbench.methods.kernels.grid import Grid, QuantizedWeight


class GridLinear(nn.Module, ABC):
    """`y = x wᵀ + b` with a weight that is made anew from trained and frozen parts in each forward pass.

    Args:
        source: The layer whose place it takes; its bias is kept.
        dtype: In which the artefact stores scales and offsets.
    """

    def __init__(self, source: nn.Linear, grid: Grid, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = source.weight.shape
        self.grid, self.dtype = grid, dtype
        self.bias = source.bias

    @abstractmethod
    def effective(self) -> Tensor:
        """The weights [out, in] in float32, those of `quantized().dequantize()` to the bit, with a gradient."""

    @abstractmethod
    def quantized(self) -> QuantizedWeight:
        """The weight as it is stored."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply inputs [..., in]; the result is [..., out]."""
        return nn.functional.linear(x, self.effective(), self.bias)


class RoundedLinear(GridLinear):
    """Full-parameter training: the weight is a parameter and is put on its grid in each forward pass.

    Args:
        put: Maps weights [out, in], the grid and the dtype of the scales to the quantized weight.
    """

    def __init__(
        self, source: nn.Linear, grid: Grid, dtype: torch.dtype, put: Callable[[Tensor, Grid, torch.dtype], QuantizedWeight]
    ) -> None:
        super().__init__(source, grid, dtype)
        self.weight = source.weight
        self._put = put

    def effective(self) -> Tensor:
        return straight_through(self.weight, self.quantized().dequantize().float())

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        return self._put(self.weight.detach(), self.grid, self.dtype)


class ScaledLinear(GridLinear):
    """Frozen codes and zero points under trained scales: w = s · (q − z).

    Args:
        codes: uint8 [out, in].
        scales: float32 [out, groups]; the parameter.
        zeros: float32 [out, groups], integers; None: all are the middle code.
    """

    codes: Tensor
    zeros: Tensor | None

    def __init__(self, source: nn.Linear, grid: Grid, dtype: torch.dtype, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> None:
        super().__init__(source, grid, dtype)
        self.register_buffer("codes", codes)
        self.register_buffer("zeros", zeros)
        self.scales = nn.Parameter(scales, requires_grad=False)

    def offsets(self) -> Tensor | None:
        """What the zero points amount to under the scales as they are."""
        return None if self.zeros is None else (self.grid.mid - self.zeros) * rounded(self.scales, self.dtype)

    def effective(self) -> Tensor:
        return expanded(self.codes, self.grid, self.scales, self.offsets(), self.dtype)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        offsets = self.offsets()
        return QuantizedWeight(self.grid, self.codes, self.scales.to(self.dtype), None if offsets is None else offsets.to(self.dtype))


class PooledAdapterLinear(GridLinear):
    """Frozen codes and scales under offsets to which a low-rank product is added: QA-LoRA's adapter, merged in each forward pass.

    Args:
        weight: Asymmetric, with groups.
        scaling: Of the product.
        generator: Of the initial values of A, on the CPU; B is zero, so that training starts from `weight`.
    """

    codes: Tensor
    scales: Tensor
    base: Tensor

    def __init__(self, source: nn.Linear, weight: QuantizedWeight, rank: int, scaling: float, generator: torch.Generator) -> None:
        super().__init__(source, weight.grid, weight.scales.dtype)
        assert weight.offsets is not None
        groups, device = weight.scales.shape[1], weight.codes.device
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales.float())
        self.register_buffer("base", weight.offsets.float())
        self.scaling = scaling
        bound = groups**-0.5
        first = torch.empty(rank, groups).uniform_(-bound, bound, generator=generator)
        self.adapter_in = nn.Parameter(first.to(device), requires_grad=False)
        self.adapter_out = nn.Parameter(torch.zeros(self.out_features, rank, device=device), requires_grad=False)

    def offsets(self) -> Tensor:
        """float32 [out, groups], before they are rounded to the dtype in which they are stored."""
        with torch.autocast(self.codes.device.type, enabled=False):
            return self.base + self.scaling * (self.adapter_out @ self.adapter_in)

    def effective(self) -> Tensor:
        return expanded(self.codes, self.grid, self.scales, self.offsets(), self.dtype)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        return QuantizedWeight(self.grid, self.codes, self.scales.to(self.dtype), self.offsets().to(self.dtype))


class _Replaced(torch.autograd.Function):
    """The second argument forward; the gradient goes to the first one unchanged."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values rounded to those of a dtype, straight-through."""
    return straight_through(value, value.detach().to(dtype).float())


def straight_through(value: Tensor, instead: Tensor) -> Tensor:
    """Another tensor of the same shape and dtype in place of a value, whose gradient goes to the value unchanged."""
    return _Replaced.apply(value, instead)


def expanded(codes: Tensor, grid: Grid, scales: Tensor, offsets: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`QuantizedWeight.dequantize` with gradients for scales and offsets.

    Args:
        codes: [out, in].
        scales: float32 [out, groups]; rounded to `dtype` here, like the offsets.
    """
    weight = (codes.float() - grid.mid).unflatten(1, (scales.shape[1], -1)) * rounded(scales, dtype).unsqueeze(-1)
    if offsets is not None:
        weight = weight + rounded(offsets, dtype).unsqueeze(-1)
    return rounded(weight.flatten(1), dtype)
