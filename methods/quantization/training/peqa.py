"""PEQA: the integers of a quantized model stay, only the scales of its grid are trained.

A weight is w = s · (q − z) with codes q and zero point z of its group. At first s and z make the squared error of the rounded weights
small (the best of several clipping ranges); then s becomes s + Δs, trained by gradient descent, while q and z are frozen. So the
artefact has the size and the speed of plain rounding, and another task is another set of scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.settings import Grouped
from slimbench.methods.core.training import TrainingSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from slimbench.methods.kernels.grid import Grid

_SHRINK_STEPS, _LEAST_RANGE = 21, 0.5


@dataclass(frozen=True)
class PEQA(TrainingSettings, Grouped, Method):
    """Scales of uniform groups, weight only; embeddings, norms and head are left alone.

    Attributes:
        bits: Bits of a weight, before scales.
        symmetric: The zero point is the middle code; else it is fitted, and kept, for each group.
    """

    name = "peqa"
    accepts = DENSE
    citation = Citation("PEQA", year=2023, arxiv="2305.14152", covers=("quantization/peqa",))
    needs = Needs(calibration=True, training=True)
    produces = "packed"

    bits: Literal[2, 3, 4] = 4
    symmetric: bool = False
    learning_rate: float = 5e-5

    @property
    def weight_grid(self) -> str:
        return uniform_grid(self.symmetric, "learned")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.kernels.grid import Grid
        from slimbench.methods.quantization.grids.trained_layers import ScaledLinear
        from slimbench.methods.quantization.solvers import qat as _qat

        grid, dtype = Grid(self.bits, self.group_size), getattr(torch, dense.dtype)
        model = _qat.load_float32(dense)
        layers = _qat.put_in(
            model, self.group_size, lambda layer: ScaledLinear(layer, grid, dtype, *fit_grid(layer.weight, grid, self.symmetric, dtype))
        )
        done = _qat.fit(model, {f"{name}.scales": layer.scales for name, layer in layers.items()}, self, calibration.ids, dense)
        _qat.save(model, layers, dense, out)
        claim = Claim(self.produces, bits=self.bits, group_size=self.group_size, details={"symmetric": self.symmetric})
        return done.added_to(claim)


def fit_grid(weight: Tensor, grid: Grid, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points with a small squared error: for each group the best of ranges from half of its own to all of it.

    Args:
        weight: float32 [out, in], without a gradient.
        dtype: The scales are values of this dtype.

    Returns:
        uint8 [out, in]; float32 [out, groups]; the same, or None for a symmetric grid.
    """
    import torch

    steps = 2**grid.bits - 1
    groups = weight.unflatten(1, (-1, grid.group_size or weight.shape[1]))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    least = torch.full_like(low, torch.inf)
    codes, scales, zeros = torch.zeros_like(groups), torch.ones_like(low), torch.full_like(low, grid.mid)
    for ratio in torch.linspace(1, _LEAST_RANGE, _SHRINK_STEPS).tolist():
        scale = (ratio * (high - low) / steps).to(dtype).float()
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        zero = torch.full_like(scale, grid.mid) if symmetric else (-ratio * low / scale).round().clamp(0, steps)
        code = ((groups / scale.unsqueeze(-1)).round() + zero.unsqueeze(-1)).clamp(0, steps)
        error = (((code - zero.unsqueeze(-1)) * scale.unsqueeze(-1) - groups) ** 2).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
        codes = torch.where(better.unsqueeze(-1), code, codes)
    return codes.flatten(1).to(torch.uint8), scales, None if symmetric else zeros
