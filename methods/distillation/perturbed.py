"""Distillation of predictions by a perturbed loss: not all that a teacher holds likely is right, so a student should not copy it blindly.

The cross entropy of a student's q under its teacher's p is a series in 1 − q. PTLoss (arXiv 2305.05010) moves its first coefficients:

    −Σ_v p(v) log q(v) = Σ_v p(v) Σ_m (1 − q(v))^m / m
    D = KL(p ‖ q) + Σ_v p(v) Σ_{m ≤ M} ε_m (1 − q(v))^m

The paper gives each class coefficients of its own and chooses them by the distance of the teacher that they amount to from the labels. Here
they are settings, and equal for all tokens of the vocabulary: without labels of classes there is nothing to choose them by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slimbench.methods.base import Citation
from slimbench.methods.distillation.logit import LogitDistillation

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PerturbedDistillation(LogitDistillation):
    """Distillation by the forward divergence with its first coefficients moved.

    Attributes:
        perturbation: ε_1, ε_2, … of the powers of 1 − q; each at least −1 / m, so that no power counts less than nothing.
    """

    name = "ptloss"
    citation = Citation("PTLoss", year=2023, arxiv="2305.05010")

    perturbation: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence != "forward":
            raise ValueError(f"divergence must be left at forward, not {self.divergence}: the series is of that one")
        if not self.perturbation or not all(-1 / m <= e < math.inf for m, e in enumerate(self.perturbation, 1)):
            raise ValueError(f"perturbation must be numbers, the m-th of them at least -1/m, not {list(self.perturbation)}")

    def apart(self, made: Tensor, wanted: Tensor) -> Tensor:
        from slimbench.methods.core.losses import perturbation

        return super().apart(made, wanted) + perturbation(made, wanted, self.perturbation, self.teacher_temperature)
