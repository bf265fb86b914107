"""PLATON: weights go that matter little, and of which it is certain that they do.

The sensitivity of a weight is |w ∂L/∂w|, averaged over windows of ΔT steps. With I_k that of the k-th window (Zhang et al., arXiv
2206.12562)

    Ī_k = β₁ Ī_(k−1) + (1 − β₁) I_k         U_k = |I_k − Ī_k|
    Ū_k = β₂ Ū_(k−1) + (1 − β₂) U_k         S_k = Ī_k Ū_k

After each window all weights but the top v_t of S, of all layers by one threshold, are set to zero, and v_t falls by the cubic schedule.
What was set to zero goes on learning, with its moments, so that it may stay when masks are next chosen; when the schedule is over, it is
set to zero after every step. w and its gradient are of one step; the authors' program takes w after the update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from slimbench.methods.base import Citation
from slimbench.methods.core.learning.gradual import Cubic, Growing
from slimbench.methods.pruning.training.sparse import SparseTraining

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class PLATON(SparseTraining):
    """Pruning by an upper bound of importance in the course of training.

    Attributes:
        begin: Share of the steps before which nothing goes.
        end: Share of the steps after which the sparsity is reached.
        importance_decay: β₁, from 0 to below 1.
        uncertainty_decay: β₂, from 0 to below 1.
        window: ΔT in steps; the authors take 10, of thousands.
    """

    name = "platon"
    citation = Citation("PLATON", year=2022, arxiv="2206.12562", covers=("pruning/platon",))
    least_steps = 1000

    begin: float = 0.1
    end: float = 0.8
    importance_decay: float = 0.85
    uncertainty_decay: float = 0.95
    window: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.begin < self.end <= 1:
            raise ValueError(f"begin and end must be shares of the steps, the first below the second, not {self.begin} and {self.end}")
        for name in ("importance_decay", "uncertainty_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, not {getattr(self, name)}")
        if not 1 <= self.window <= self.cubic.end:
            raise ValueError(f"window must be between 1 and the {self.cubic.end} steps in which the sparsity grows, not {self.window}")

    @property
    def cubic(self) -> Cubic:
        """1 − v_t, by steps."""
        return Cubic(0.0, self.sparsity, round(self.begin * self.steps), round(self.end * self.steps))

    def hooks(self, weights: Mapping[str, nn.Parameter], parameters: Mapping[str, nn.Parameter]) -> Sensitivities:
        decays = self.importance_decay, self.uncertainty_decay
        return Sensitivities(weights, schedule=self.cubic, every=self.window, decays=decays)


@dataclass
class Sensitivities(Growing):
    """The averages, and masks that bind only when they are chosen and at the end.

    Attributes:
        every: ΔT.
        decays: β₁ and β₂.
        sums: Of |w ∂L/∂w| over the steps of the window that is on.
        importance: Ī.
        uncertainty: Ū.
    """

    decays: tuple[float, float] = field(kw_only=True)
    sums: dict[str, Tensor] = field(init=False)
    importance: dict[str, Tensor] = field(init=False)
    uncertainty: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        import torch

        self.sums, self.importance, self.uncertainty = (
            {name: torch.zeros_like(value, requires_grad=False) for name, value in self.parameters.items()} for _ in range(3)
        )

    def scores(self) -> Mapping[str, Tensor]:
        return {name: importance * self.uncertainty[name] for name, importance in self.importance.items()}

    def after_backward(self, step: int) -> None:
        for name, value in self.parameters.items():
            assert value.grad is not None
            self.sums[name] += (value.detach() * value.grad).abs()

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        done = step + 1
        if done % self.every == 0:
            self.average()
        if done >= self.schedule.end or (done > self.schedule.begin and done % self.every == 0):
            self.masks = self.choose(self.schedule.at(done))
            for name, mask in self.masks.items():
                self.parameters[name].detach().masked_fill_(mask, 0.0)

    def average(self) -> None:
        """End a window."""
        first, second = self.decays
        for name, total in self.sums.items():
            found = total / self.every
            importance = self.importance[name].mul_(first).add_(found, alpha=1 - first)
            self.uncertainty[name].mul_(second).add_((found - importance).abs(), alpha=1 - second)
            total.zero_()

    def state(self) -> dict[str, Tensor]:
        parts = {"mask": self.masks, "sum": self.sums, "importance": self.importance, "uncertainty": self.uncertainty}
        return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"mask": {}, "sum": {}, "importance": {}, "uncertainty": {}}
        for key, tensor in state.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor.to(self.parameters[name].device)
        self.masks, self.sums, self.importance, self.uncertainty = parts.values()
