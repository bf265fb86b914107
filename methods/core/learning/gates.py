"""Learned gates: whether a unit of a model stays is a number that is learned with the loss, and cut to a budget at the end.

A hard concrete gate with the parameter α is (Louizos et al., arXiv 1712.01312, equations 10 to 13)

    s = σ((ln u − ln(1 − u) + α) / β),   z = min(1, max(0, s (ζ − γ) + γ)),   u even in (0, 1)
    P(z ≠ 0) = σ(α − β ln(−γ / ζ)),      without a draw  ẑ = min(1, max(0, σ(α) (ζ − γ) + γ))

z multiplies what a unit gives on, so that the loss has a gradient for α, and the expected size of the model is a sum of P(z ≠ 0). A
budget is held by a Lagrangian: with the share ŝ of the parameters that is expected to go and the share t that shall,

    min over α, max over λ₁, λ₂:    loss + λ₁ (ŝ − t) + λ₂ (ŝ − t)²

(Wang et al., arXiv 1910.04732): the multipliers climb, so that the price of a gap rises for as long as there is one. t grows from zero
over the first steps. At the end the units of the lowest ẑ go, exactly as many as the budget asks for, and the ẑ of those that stay is
multiplied into the weights that read them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimbench.methods.core.architecture.units import Structures, cheapest, price
from slimbench.methods.core.learning.hooks import Group, Hooks


@dataclass(frozen=True)
class HardConcrete:
    """The law of gates.

    Attributes:
        temperature: β.
        low: γ, below 0.
        high: ζ, above 1.
    """

    temperature: float = 2 / 3
    low: float = -0.1
    high: float = 1.1

    def draw(self, alpha: Tensor, even: Tensor) -> Tensor:
        """z, of α and numbers u even in (0, 1) of its shape."""
        return self._stretched(torch.sigmoid((even.log() - (1 - even).log() + alpha) / self.temperature))

    def settled(self, alpha: Tensor) -> Tensor:
        """ẑ."""
        return self._stretched(torch.sigmoid(alpha))

    def stays(self, alpha: Tensor) -> Tensor:
        """P(z ≠ 0)."""
        ratio = torch.tensor(-self.low / self.high, device=alpha.device)
        return torch.sigmoid(alpha - self.temperature * ratio.log())

    def _stretched(self, shares: Tensor) -> Tensor:
        return (shares * (self.high - self.low) + self.low).clamp(0, 1)


class Gates(Hooks):
    """A gate for each unit of some kinds, and the Lagrangian that holds their budget.

    Attributes:
        kinds: By the full name of the layer that reads the units.
        parameters: α of each kind, [count], and the two multipliers; what `train` gets, beside whatever else learns.
        path: For each step the share ŝ that was expected to go after it, the share t that should, λ₁ and λ₂.
    """

    def __init__(
        self,
        kinds: Mapping[str, Structures],
        share: float,
        warm: int,
        law: HardConcrete | None = None,
        begin: float = 2.0,
        rate: float = 1.0,
        multiplier_rate: float = 1.0,
    ) -> None:
        """All gates start open alike.

        Args:
            kinds: What may go; layers are those of the model that learns.
            share: Of the parameters of all these units, that shall go.
            warm: Steps in which the target grows to that share.
            begin: α before the first step.
            rate: Factor of the learning rate for α.
            multiplier_rate: The same for λ₁ and λ₂.
        """
        device = next(iter(kinds.values())).reads.weight.device
        self.kinds, self.share, self.warm, self.law = dict(kinds), share, warm, law or HardConcrete()
        self.alphas = {name: nn.Parameter(torch.full((kind.count,), begin, device=device)) for name, kind in kinds.items()}
        self.multipliers = nn.Parameter(torch.zeros(2, device=device))
        self.rate, self.multiplier_rate = rate, multiplier_rate
        self.step = 0
        self.path: list[tuple[float, float, float, float]] = []

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"gates/{name}": alpha for name, alpha in self.alphas.items()} | {"multipliers": self.multipliers}

    def gone(self) -> Tensor:
        """ŝ, a scalar with its gradient: the share of the parameters of all units that is expected to go."""
        stay = [price(self.kinds[name]) * self.law.stays(alpha).sum() for name, alpha in self.alphas.items()]
        return 1 - torch.stack(stay).sum() / self.total

    @property
    def total(self) -> int:
        """Parameters of all units."""
        return sum(price(kind) * kind.count for kind in self.kinds.values())

    def target(self) -> float:
        """t, of the step that is on."""
        return self.share * min(1.0, (self.step + 1) / max(1, self.warm))

    def penalty(self) -> Tensor:
        """λ₁ (ŝ − t) + λ₂ (ŝ − t)², a scalar to add to the loss."""
        gap = self.gone() - self.target()
        return self.multipliers[0] * gap + self.multipliers[1] * gap.square()

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Units multiplied by gates drawn now, from torch's own random numbers: those of `train`, which a checkpoint holds."""
        even = {name: torch.rand_like(alpha).clamp(1e-6, 1 - 1e-6) for name, alpha in self.alphas.items()}
        with multiplied(self.kinds, {name: self.law.draw(alpha, even[name]) for name, alpha in self.alphas.items()}):
            yield

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Units multiplied by ẑ."""
        with multiplied(self.kinds, {name: self.law.settled(alpha.detach()) for name, alpha in self.alphas.items()}):
            yield

    def groups(self) -> Sequence[Group]:
        return (
            Group(tuple(f"gates/{name}" for name in self.alphas), factor=self.rate, weight_decay=0.0),
            Group(("multipliers",), factor=self.multiplier_rate, weight_decay=0.0, maximize=True),
        )

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        with torch.no_grad():
            first, second = self.multipliers.tolist()
            self.path.append((float(self.gone()), self.target(), first, second))
        self.step = step + 1

    def state(self) -> dict[str, Tensor]:
        return {"path": torch.tensor(self.path, dtype=torch.float64).reshape(-1, 4)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.path = [(row[0], row[1], row[2], row[3]) for row in state["path"].tolist()]
        self.step = len(self.path)

    def chosen(self, wanted: int) -> dict[str, Tensor]:
        """The units that go for so many parameters, those of the lowest P(z ≠ 0) first, as masks by the names of `kinds`.

        Raises:
            Unsupported: One unit of each kind stays, and all others do not hold so many.
        """
        return cheapest({name: self.law.stays(alpha.detach()) for name, alpha in self.alphas.items()}, self.kinds, wanted)

    @torch.no_grad()
    def finish(self, model: Any, wanted: int) -> dict[str, Tensor]:
        """Cut the units that go out of a model and fold ẑ into the weights that read the others, in place; see `chosen`."""
        gone = self.chosen(wanted)
        for name, kind in self.kinds.items():
            kind.reads.weight.mul_(spread(self.law.settled(self.alphas[name]), kind))
            if bool(gone[name].any()):
                kind.cut(model, (~gone[name]).nonzero().squeeze(1))
        return gone

    def told(self) -> dict[str, Any]:
        """What a claim says of the gates: the path of ŝ, t and the multipliers, and ŝ at the end."""
        return {"expected_gone": self.path[-1][0] if self.path else 0.0, "path": [[round(value, 6) for value in row] for row in self.path]}


def spread(values: Tensor, kind: Structures) -> Tensor:
    """Values [count] of units for each input [in] of the layer that reads them."""
    return values.repeat_interleave(kind.reads.in_features // kind.count)


@contextmanager
def multiplied(kinds: Mapping[str, Structures], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply what units give on, for a while, by a value [count] each; gradients flow to the values."""

    def gated(kind: Structures, z: Tensor, _: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] * spread(z, kind).to(args[0].dtype),)

    placed = [kind.reads.register_forward_pre_hook(partial(gated, kind, values[name])) for name, kind in kinds.items()]
    try:
        yield
    finally:
        for hook in placed:
            hook.remove()
