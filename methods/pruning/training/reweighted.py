"""Reweighted penalties: what is small is shrunk more than what is large, until zeros are chosen to the exact count and stay.

With the size ‖w_g‖ of a weight or of a group of them, and N rounds,

    min over w    f(w) + λ Σ_g α_g ‖w_g‖        α_g = 1 / (‖w_g‖ + ε),   of the weights at the beginning of each round

(Candès et al., 2008). An ℓ1 penalty takes the same from all, α does not, so that λ Σ α_g ‖w_g‖ comes near to λ times the number of
groups that are left. Then the smallest groups are set to zero, as many as are asked for, and the rest learns without the penalty.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from slimbench.methods.core.learning.hooks import Locked
from slimbench.methods.pruning.training.sparse import SparseTraining

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Reweighted(SparseTraining):
    """A method that shrinks, cuts and trains what is left.

    Attributes:
        penalty: λ.
        epsilon: ε, in the units of the weights.
        rounds: N: how often α is set, the first time by the dense weights.
        shrinking: Share of the steps under the penalty; the rest is training under the mask.
    """

    penalty: float = 0.1
    epsilon: float = 1e-3
    rounds: int = 4
    shrinking: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("penalty", "epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if not 0 < self.shrinking < 1:
            raise ValueError(f"shrinking must be between 0 and 1, both excluded, not {self.shrinking}")
        if not 1 <= self.rounds <= self.cut:
            raise ValueError(f"rounds must be between 1 and the {self.cut} steps under the penalty, not {self.rounds}")

    @property
    def cut(self) -> int:
        """Steps under the penalty."""
        return round(self.shrinking * self.steps)


@dataclass
class Shrinking(Locked):
    """The penalty of each step, and the masks at its end.

    Attributes:
        penalty: λ.
        epsilon: ε.
        rounds: N.
        cut: Steps under the penalty.
        alphas: α by parameter, of the shape of its sizes; empty when it is over.
    """

    penalty: float = field(kw_only=True)
    epsilon: float = field(kw_only=True)
    rounds: int = field(kw_only=True)
    cut: int = field(kw_only=True)
    alphas: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.alphas = self.reweighted()

    @abstractmethod
    def sizes(self, weight: Tensor) -> Tensor:
        """‖w_g‖ of the groups of a weight [out, in]."""

    @abstractmethod
    def choose(self) -> dict[str, Tensor]:
        """The masks that stay."""

    def reweighted(self) -> dict[str, Tensor]:
        """α, of the weights as they are."""
        return {name: 1 / (self.sizes(value.detach()) + self.epsilon) for name, value in self.parameters.items()}

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        if step + 1 == self.cut:
            self.masks, self.alphas = self.choose(), {}
        elif step + 1 in {self.cut * done // self.rounds for done in range(1, self.rounds)}:
            self.alphas = self.reweighted()
        super().after_step(step, optimizer)

    def state(self) -> dict[str, Tensor]:
        kept = {f"mask/{name}": mask for name, mask in self.masks.items()}
        return kept | {f"alpha/{name}": alpha for name, alpha in self.alphas.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"mask": {}, "alpha": {}}
        for key, tensor in state.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor.to(self.parameters[name].device)
        self.masks, self.alphas = parts["mask"], parts["alpha"]
