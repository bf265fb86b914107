"""Globally unique movement (GUM): channels that move towards zero go, and of those that do the same as others more.

A channel of an MLP has one score, that of block movement pruning (`block_movement`), and the lowest of all blocks go, ever more of them.
With A the inputs of down, one column a channel, and their products P = Aᵀ A of a step averaged over steps (Santacroce et al., arXiv
2302.03773, and their program),

    P̄ ← m P̄ + (1 − m) P        c_ij = P̄_ij / (P̄_ii P̄_jj)^½        U_j = Σ_(i ≠ j) |c_ij| / (n v_t)

of n channels a block and the share v_t that is left, the penalty of the scores is

    λ_t mean σ(S_j) (1 + λ_u U_j)        λ_t = λ (1 − v_t) / (1 − v)

averaged over blocks. A block holds P̄, a float32 for each pair of its channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import EDITED, HUGGINGFACE, Citation, Claim, DenseModel
from slimbench.methods.core.learning.gradual import Cubic
from slimbench.methods.core.masks import across
from slimbench.methods.pruning.training.block_movement import channels, cut, spared
from slimbench.methods.pruning.training.scored import Masks, ScoredTraining, Scores, Units

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class GUM(ScoredTraining):
    """Blocks keep different numbers of channels, at least one each.

    Attributes:
        sparsity: Fraction of all channels that goes.
        penalty: λ.
        uniqueness: λ_u.
        memory: m, from 0 to below 1.
    """

    name = "gum"
    citation = Citation("GUM", year=2023, arxiv="2302.03773")
    accepts = (HUGGINGFACE,)
    produces = EDITED

    sparsity: float = 0.25
    penalty: float = 20.0
    uniqueness: float = 1.0
    memory: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("penalty", "uniqueness"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 0 <= self.memory < 1:
            raise ValueError(f"memory must be from 0 to below 1, not {self.memory}")

    def masks(self, model: Any, layers: Mapping[str, nn.Linear], seed: int) -> Unique:
        shapes, units = channels(model)
        masks = Unique(
            {name: layers[name].weight for name in units},
            shapes,
            units,
            self.score_rate,
            self.growth(self.sparsity),
            self.penalty,
            self.uniqueness,
            self.memory,
        )
        for name in shapes:
            masks.watch(name, layers[name])
        return masks

    def written(self, model: Any, layers: Mapping[str, nn.Linear], masks: Masks, dense: DenseModel, out: Path) -> Claim:
        from slimbench.methods.core.architecture.surgery import counts
        from slimbench.methods.core.learning import trained

        left = cut(model, masks.chosen)
        trained.save(model, dense, out)
        return Claim(EDITED, **counts(model), details={"channels_by_block": left})


class Unique(Scores):
    """Scores of channels, and how alike the channels are.

    Attributes:
        schedule: 1 − v_t.
        penalty: λ.
        uniqueness: λ_u.
        memory: m.
        products: P̄ [channels, channels] by the layer that reads them.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, int]],
        units: Mapping[str, Units],
        rate: float,
        schedule: Cubic,
        penalty: float,
        uniqueness: float,
        memory: float,
    ) -> None:
        import torch

        super().__init__(weights, shapes, units, rate)
        self.schedule, self.penalty, self.uniqueness, self.memory = schedule, penalty, uniqueness, memory
        self.products = {name: torch.zeros(count, count, device=self.scores[name].device) for name, (count, _) in shapes.items()}
        self._step: dict[str, Tensor] = {}
        self._placed: list[RemovableHandle] = []

    def watch(self, name: str, reads: nn.Linear) -> None:
        """Add up the products of what a layer reads, while gradients are computed."""
        import torch

        def seen(inputs: Tensor) -> None:
            values = inputs.detach().flatten(0, -2).float()
            held = self._step.get(name)
            self._step[name] = values.T @ values if held is None else held.addmm_(values.T, values)

        self._placed.append(reads.register_forward_pre_hook(lambda _, args: seen(args[0]) if torch.is_grad_enabled() else None))

    def finish(self) -> None:
        for hook in self._placed:
            hook.remove()
        super().finish()

    def alike(self, name: str, left: float) -> Tensor:
        """U [channels, 1] of a block, of P̄ and the share of channels that is left."""
        products = self.products[name]
        norms = products.diagonal().sqrt()
        cosines = (products / (norms.unsqueeze(1) * norms).clamp_min(1e-6)).abs().fill_diagonal_(0)
        return (cosines.sum(0) / (len(norms) * left)).unsqueeze(1)

    def after_backward(self, step: int) -> None:
        for name, found in self._step.items():
            self.products[name].mul_(self.memory).add_(found, alpha=1 - self.memory)
        self._step = {}
        share = self.schedule.at(step)
        factors = {name: 1 + self.uniqueness * self.alike(name, 1 - share) for name in self.scores}
        self.penalize(self.penalty * share / self.schedule.final, factors)

    def choose(self, done: int) -> dict[str, Tensor]:
        compared = {name: values.detach() for name, values in self.scores.items()}
        return across(spared(compared), round(self.schedule.at(done) * sum(values.numel() for values in compared.values())))

    def state(self) -> dict[str, Tensor]:
        return super().state() | {f"/products/{name}": products for name, products in self.products.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, products in self.products.items():
            products.copy_(state[f"/products/{name}"])
        super().load({name: tensor for name, tensor in state.items() if not name.startswith("/products/")})
