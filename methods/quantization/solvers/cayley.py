"""Gradient descent over orthogonal matrices by the Cayley transform (Li et al., arXiv 2002.01113; SpinQuant, arXiv 2405.16406).

With the gradient G of a loss at an orthogonal matrix R, a step of length α goes along the curve

    Ĝ = G Rᵀ − ½ R Rᵀ G Rᵀ,    Y = Ĝ − Ĝᵀ,    R' = (I + α/2 Y)⁻¹ (I − α/2 Y) R

which stays orthogonal because Y is skew-symmetric, and whose slope at R is the part of −G that is tangent to the orthogonal matrices.
The papers reach R' by a few rounds of a fixed-point iteration, which contracts for α ≤ 1 / ‖Y‖; the same bound on the step holds
here, but the equation is solved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

_TINY = 1e-8


class CayleySGD(torch.optim.Optimizer):
    """Steepest descent without momentum for parameters that are orthogonal matrices, best in float64.

    Args:
        lr: α, as long as it is not above the bound.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for rotation in group["params"]:
                if rotation.grad is not None:
                    slope = skew(rotation, rotation.grad)
                    longest = 1 / (torch.linalg.matrix_norm(slope, 1) + _TINY)
                    rotation.copy_(turned(rotation, slope, longest.clamp_max(group["lr"])))


def skew(rotation: Tensor, gradient: Tensor) -> Tensor:
    """Y for an orthogonal matrix and the gradient at it, [n, n] each."""
    projected = gradient @ rotation.T
    projected = projected - rotation @ (rotation.T @ projected) / 2
    return projected - projected.T


def turned(rotation: Tensor, slope: Tensor, step: Tensor | float) -> Tensor:
    """R' for a skew-symmetric slope Y and a step α."""
    half, one = step / 2 * slope, torch.eye(len(slope), dtype=slope.dtype, device=slope.device)
    return torch.linalg.solve(one + half, (one - half) @ rotation)
