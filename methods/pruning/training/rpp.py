"""Reweighted proximal pruning: the optimizer sees the loss alone, and the penalty is a step of its own that sets weights to zero.

The penalty is that of `reweighted` with single weights as groups. Each step under it is one of AdamW on f, whose moments hold nothing of
the penalty, and then its proximal operator with the learning rate η of the step (Guo et al., arXiv 1909.12486),

    a = AdamW(w, ∇f)        w_i = argmin_x  (x − a_i)² / 2 + η λ α_i |x|  =  sign(a_i) max(|a_i| − η λ α_i, 0)

At the end of the penalty the smallest |w| of all layers together go, exactly as many as are asked for: more than the operator made zero
or fewer. In the paper the pattern is found in pretraining and kept while tasks are learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Citation
from slimbench.methods.core.masks import across
from slimbench.methods.pruning.training.reweighted import Reweighted, Shrinking

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class RPP(Reweighted):
    """Proximal steps on single weights."""

    name = "rpp"
    citation = Citation("RPP", year=2019, arxiv="1909.12486")
    least_steps = 1000

    def hooks(self, weights: Mapping[str, nn.Parameter], parameters: Mapping[str, nn.Parameter]) -> Proximal:
        return Proximal(weights, {}, penalty=self.penalty, epsilon=self.epsilon, rounds=self.rounds, cut=self.cut, sparsity=self.sparsity)

    def told(self, hooks: Any) -> dict[str, Any]:
        return {"zeros_by_the_penalty": hooks.reached}


def shrunk(values: Tensor, thresholds: Tensor) -> Tensor:
    """sign(a) max(|a| − t, 0), of values a and thresholds t of one shape."""
    return values.sign() * (values.abs() - thresholds).clamp_min(0)


@dataclass
class Proximal(Shrinking):
    """The proximal operator after each step under the penalty.

    Attributes:
        sparsity: Share of zeros among the weights of the mask that stays.
        reached: Share of zeros that the penalty made, before the mask was chosen.
    """

    sparsity: float = field(kw_only=True)
    reached: float = field(init=False, default=0.0)

    def sizes(self, weight: Tensor) -> Tensor:
        return weight.abs()

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        if step < self.cut:
            scale = optimizer.param_groups[0]["lr"] * self.penalty
            for name, value in self.parameters.items():
                value.detach().copy_(shrunk(value.detach(), scale * self.alphas[name]))
        super().after_step(step, optimizer)

    def choose(self) -> dict[str, Tensor]:
        total = sum(value.numel() for value in self.parameters.values())
        self.reached = sum(int((value.detach() == 0).sum()) for value in self.parameters.values()) / total
        return across({name: value.detach().abs() for name, value in self.parameters.items()}, round(self.sparsity * total))

    def state(self) -> dict[str, Tensor]:
        import torch

        return super().state() | {"reached": torch.tensor(self.reached, dtype=torch.float64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.reached = float(state["reached"])
        super().load({name: tensor for name, tensor in state.items() if name != "reached"})
