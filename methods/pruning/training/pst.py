"""PST: parameter-efficient sparse training. A few vectors say how the weights change and which of them matter.

Of a weight W₀ [out, in], that is frozen, the layer computes with (Li et al., arXiv 2205.11314, and their program)

    W = W₀ + β U V                    U [out, r₁]   V [r₁, in]
    S = |W| + α₁ A B + α₂ (R + C)     A [out, r₂]   B [r₂, in]   R [out]   C [in]
    W ⊙ M                             M: the top v_t of S in each layer, v falls by the cubic schedule

|W| is what is known without data; the rest is learned from it, as movement pruning learns a score for each weight (`scored`): A, B, R and
C get the gradient ∂L/∂(W ⊙ M) ⊙ W of S, and through |W| so do U and V, beside that of M. U and A begin as normal random numbers, the
others with 0. Nothing else learns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Citation
from slimbench.methods.core.learning.gradual import Cubic
from slimbench.methods.core.masks import choose
from slimbench.methods.pruning.training.scored import Masks, ScoredTraining

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn


@dataclass(frozen=True)
class PST(ScoredTraining):
    """Low-rank changes of the weights, and low-rank and structured changes of their importance.

    Attributes:
        weight_rank: r₁.
        score_rank: r₂.
        weight_scale: β.
        low_rank_scale: α₁.
        structured_scale: α₂.
    """

    name = "pst"
    citation = Citation("PST", year=2022, arxiv="2205.11314", covers=("pruning/pst",))
    frozen = True

    score_rate: float = 1.0
    weight_rank: int = 8
    score_rank: int = 8
    weight_scale: float = 1.0
    low_rank_scale: float = 1.0
    structured_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight_rank", "score_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("weight_scale", "low_rank_scale", "structured_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")

    def masks(self, model: Any, layers: Mapping[str, nn.Linear], seed: int) -> Factored:
        import torch

        weights = {name: layer.weight for name, layer in layers.items()}
        scales = self.weight_scale, self.low_rank_scale, self.structured_scale
        generator = torch.Generator().manual_seed(seed)
        ranks = self.weight_rank, self.score_rank
        return Factored(weights, self.score_rate, self.growth(self.sparsity), ranks, scales, generator)


class Factored(Masks):
    """The factors of each layer.

    Attributes:
        schedule: 1 − v_t.
        scales: β, α₁ and α₂.
        factors: U, V, A, B, R and C by layer, under these letters.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        rate: float,
        schedule: Cubic,
        ranks: tuple[int, int],
        scales: tuple[float, float, float],
        generator: Generator,
    ) -> None:
        import torch

        super().__init__(weights, rate)
        self.schedule, self.scales = schedule, scales
        self.factors = {name: _factors(weight, ranks, generator) for name, weight in weights.items()}
        self.chosen = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in weights.items()}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"factors/{name}/{letter}": value for name, held in self.factors.items() for letter, value in held.items()}

    def whole(self, layer: str) -> Tensor:
        held = self.factors[layer]
        return self.weights[layer] + self.scales[0] * held["U"] @ held["V"]

    def score(self, layer: str) -> Tensor:
        held = self.factors[layer]
        structured = held["R"].unsqueeze(1) + held["C"]
        return self.whole(layer).abs() + self.scales[1] * held["A"] @ held["B"] + self.scales[2] * structured

    def gone(self, layer: str) -> Tensor:
        return self.chosen[layer]

    def choose(self, done: int) -> dict[str, Tensor]:
        share = self.schedule.at(done)
        return {name: choose(self.score(name), round(share * weight.numel())) for name, weight in self.weights.items()}


def _factors(weight: Tensor, ranks: tuple[int, int], generator: Generator) -> dict[str, nn.Parameter]:
    import torch
    from torch import nn

    (rows, columns), (first, second) = weight.shape, ranks
    values = {
        "U": torch.randn(rows, first, generator=generator),
        "V": torch.zeros(first, columns),
        "A": torch.randn(rows, second, generator=generator),
        "B": torch.zeros(second, columns),
        "R": torch.zeros(rows),
        "C": torch.zeros(columns),
    }
    return {letter: nn.Parameter(value.to(weight.device)) for letter, value in values.items()}
