"""Learned gates: whether a unit of a model stays is a number that is learned with the loss, and cut to a budget at the end.

A hard concrete gate with the parameter α is (Louizos et al., arXiv 1712.01312, equations 10 to 13)

    s = σ((ln u − ln(1 − u) + α) / β),   z = min(1, max(0, s (ζ − γ) + γ)),   u even in (0, 1)
    P(z ≠ 0) = σ(α − β ln(−γ / ζ)),      without a draw  ẑ = min(1, max(0, σ(α) (ζ − γ) + γ))

z multiplies what a unit gives on, so that the loss has a gradient for α, and the expected size of the model is a sum of P(z ≠ 0). A
budget is held by a Lagrangian: with the share ŝ of the parameters that is expected to go and the share t that shall,

    min over α, max over λ₁, λ₂:    loss + κ (λ₁ (ŝ − t) + λ₂ (ŝ − t)²)        κ = median |∂loss/∂α| / |∂ŝ/∂α|, at first

(Wang et al., arXiv 1910.04732): the multipliers climb, so that the price of a gap rises for as long as there is one. t grows over the
first steps from the ŝ that there is before them. λ₁ adds up gaps, and where steps are few it overshoots; λ₂ answers to the gap that there
is, so it may have a higher rate. The papers have no κ, and rates for one model and thousands of steps; with it λ₁ = 1 pulls at the gates
as hard as the loss does, whatever the model and however many gates there are. At the end the units of the lowest P(z ≠ 0) go, exactly as
many as the budget asks for, and the ẑ of those that stay is multiplied into the weights that read them. With a price in the place of a
budget (Louizos et al.) the loss has

    λ Σ P(z ≠ 0)      over all gates

and in the end those go whose ẑ is 0, as many as there are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimbench.methods.core.architecture.units import Structures, cheapest, price
from slimbench.methods.core.learning.hooks import Group, Hooks
from slimbench.methods.core.learning.terms import term

_ROWS = 50  # of a path in a claim
_SURE = 30.0  # α of a gate that no draw moves


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

    def folded(self, alpha: Tensor) -> Tensor:
        """What a unit is multiplied by that stays in the end: ẑ, or σ(α) where the budget keeps it although ẑ is 0."""
        settled = self.settled(alpha)
        return torch.where(settled > 0, settled, torch.sigmoid(alpha))

    def stays(self, alpha: Tensor) -> Tensor:
        """P(z ≠ 0)."""
        ratio = torch.tensor(-self.low / self.high, device=alpha.device)
        return torch.sigmoid(alpha - self.temperature * ratio.log())

    def _stretched(self, shares: Tensor) -> Tensor:
        return (shares * (self.high - self.low) + self.low).clamp(0, 1)


@dataclass(frozen=True)
class Pace:
    """How gates learn.

    Attributes:
        warm: Steps in which the target grows to the whole share.
        begin: α before the first step.
        rate: Factor of the learning rate for α.
        multiplier_rate: The same for λ₁.
        square_rate: The same for λ₂; None: as λ₁.
        price: λ of an open gate, which then stands in the place of the budget; None: there is one.
    """

    warm: int
    begin: float = 2.0
    rate: float = 1.0
    multiplier_rate: float = 1.0
    square_rate: float | None = None
    price: float | None = None


class Lagrangian(Hooks):
    """Gates of some kinds, and the Lagrangian that holds their budget.

    Attributes:
        alphas: α by kind; at first all are open alike.
        multipliers: λ₁ and λ₂.
        scale: κ, 1 before the first step.
        fixed: No gate and no multiplier learns; see `fix`.
        start: ŝ before the first step.
        path: For each step the share ŝ that was expected to go after it, the share t that should, λ₁ and λ₂.
    """

    def __init__(
        self, sizes: Mapping[str, Sequence[int]], device: torch.device, share: float, pace: Pace, law: HardConcrete | None = None
    ) -> None:
        """Open gates.

        Args:
            sizes: Shapes of α by kind.
            share: Of the parameters of all units, that shall go.
        """
        self.alphas = {name: nn.Parameter(torch.full(tuple(size), pace.begin, device=device)) for name, size in sizes.items()}
        self.share, self.pace, self.law, self.fixed = share, pace, law or HardConcrete(), False
        self.multipliers = tuple(nn.Parameter(torch.zeros((), device=device)) for _ in range(2))
        self.scale = torch.ones((), device=device)
        with torch.no_grad():
            self.start = float(self.gone())
        self.step = 0
        self.path: list[tuple[float, ...]] = []

    @abstractmethod
    def gone(self) -> Tensor:
        """ŝ, a scalar with its gradient: the share of the parameters of all units that is expected to go."""

    @abstractmethod
    def applied(self, values: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Units multiplied for a while by values of the shapes of `alphas`; gradients flow to these."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """α of each kind and the multipliers, unless they are fixed; what `train` gets, beside whatever else learns."""
        if self.fixed:
            return {}
        gates = {f"gates/{name}": alpha for name, alpha in self.alphas.items()}
        return gates | {f"multipliers/{index + 1}": value for index, value in enumerate(self.multipliers)}

    @torch.no_grad()
    def fix(self, choose: Callable[[], Mapping[str, Tensor]], seed: int) -> None:
        """Shut gates at random, for good: the control, which learned ones have to beat.

        Args:
            choose: The gates that are shut, as masks by kind, those of the lowest α first; of kinds that it leaves out all stay open.
            seed: Of the α by which it chooses.
        """
        generator = torch.Generator().manual_seed(seed)
        for alpha in self.alphas.values():
            alpha.copy_(torch.randn(alpha.shape, generator=generator))
        gone = choose()
        for name, alpha in self.alphas.items():  # among those that are shut the order stays, by which they are cut in the end
            alpha.add_(torch.where(gone[name], -_SURE, _SURE) if name in gone else _SURE)
        self.fixed, self.start = True, float(self.gone())

    def target(self) -> float:
        """t, of the step that is on."""
        return self.start + (self.share - self.start) * self.grown

    @property
    def grown(self) -> float:
        """How much of the target there is in the step that is on, 0..1."""
        return min(1.0, (self.step + 1) / max(1, self.pace.warm))

    def penalty(self) -> Tensor:
        """What is added to the loss, which hears it by its name: the multipliers climb, and the loss of the text does not."""
        return term("gates", self.priced())

    def priced(self) -> Tensor:
        """κ (λ₁ (ŝ − t) + λ₂ (ŝ − t)²) or λ Σ P(z ≠ 0), a scalar; 0 where gates are fixed."""
        if self.pace.price is not None and not self.fixed:
            return self.pace.price * torch.stack([self.law.stays(alpha).sum() for alpha in self.alphas.values()]).sum()
        gap = self.gone() - self.target()
        return self.scale * (self.multipliers[0] * gap + self.multipliers[1] * gap.square())

    def shut(self) -> dict[str, Tensor]:
        """The gates whose ẑ is 0, as masks by kind."""
        return {name: self.law.settled(alpha.detach()) == 0 for name, alpha in self.alphas.items()}

    def draws(self) -> dict[str, Tensor]:
        """z of each kind, drawn from torch's own random numbers: those of `train`, which a checkpoint holds."""
        even = {name: torch.rand_like(alpha).clamp(1e-6, 1 - 1e-6) for name, alpha in self.alphas.items()}
        return {name: self.law.draw(alpha, even[name]) for name, alpha in self.alphas.items()}

    def drawn(self) -> AbstractContextManager[None]:
        """Units multiplied by gates drawn now."""
        return self.applied(self.draws())

    def settled(self) -> AbstractContextManager[None]:
        """Units multiplied by ẑ."""
        return self.applied({name: self.law.settled(alpha.detach()) for name, alpha in self.alphas.items()})

    def groups(self) -> Sequence[Group]:
        if self.fixed:
            return ()
        names, first = tuple(f"gates/{name}" for name in self.alphas), self.pace.multiplier_rate
        rates = enumerate((first, first if self.pace.square_rate is None else self.pace.square_rate))
        climbing = (Group((f"multipliers/{index + 1}",), rate, weight_decay=0.0, maximize=True, free=True) for index, rate in rates)
        return Group(names, self.pace.rate, weight_decay=0.0, free=True), *climbing

    def row(self) -> tuple[float, ...]:
        """What `path` says of the step that is on."""
        first, second = self.multipliers
        return float(self.gone()), self.target(), float(first), float(second)

    def after_backward(self, step: int) -> None:
        if step == 0 and not self.fixed and self.pace.price is None:
            self.scale = self.weighed()

    def weighed(self) -> Tensor:
        """κ, of the shape of a multiplier, while the gradients of the loss alone are there: those of the first step, with λ = 0."""
        return compared(self.gone(), self.alphas.values())

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        with torch.no_grad():
            self.path.append(self.row())
        self.step = step + 1

    def state(self) -> dict[str, Tensor]:
        return {"path": torch.tensor(self.path, dtype=torch.float64), "scale": self.scale}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.path = [tuple(row) for row in state["path"].tolist()]
        self.step, self.scale = len(self.path), state["scale"].to(self.scale.device)

    def told(self) -> dict[str, Any]:
        """What a claim says of the gates: κ, ŝ at the end, and at most 50 rows of the path, the first and the last among them."""
        last = len(self.path) - 1
        steps = range(last + 1) if last < _ROWS else sorted({round(row * last / (_ROWS - 1)) for row in range(_ROWS)})
        rows = [[step + 1, *(round(value, 6) for value in self.path[step])] for step in steps]
        return {"scale": self.scale.tolist(), "expected_gone": self.path[-1][0] if self.path else 0.0, "path": rows}


class Gates(Lagrangian):
    """A gate for each unit of some kinds.

    Attributes:
        kinds: By the full name of the layer that reads the units; so are `alphas`, [count].
    """

    def __init__(self, kinds: Mapping[str, Structures], share: float, pace: Pace, law: HardConcrete | None = None) -> None:
        """Open gates.

        Args:
            kinds: What may go; layers are those of the model that learns.
        """
        self.kinds = dict(kinds)
        device = next(iter(kinds.values())).reads.weight.device
        super().__init__({name: (kind.count,) for name, kind in kinds.items()}, device, share, pace, law)

    def gone(self) -> Tensor:
        stay = [price(kind) * self.law.stays(self.alphas[name]).sum() for name, kind in self.kinds.items()]
        return 1 - torch.stack(stay).sum() / self.total

    @property
    def total(self) -> int:
        """Parameters of all units."""
        return sum(price(kind) * kind.count for kind in self.kinds.values())

    def applied(self, values: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        return multiplied(self.kinds, values)

    def chosen(self, wanted: int) -> dict[str, Tensor]:
        """The units that go for so many parameters, those of the lowest P(z ≠ 0) first, as masks by the names of `kinds`.

        With a price those go that are shut, but for one unit of each kind.

        Raises:
            Unsupported: One unit of each kind stays, and all others do not hold so many.
        """
        if self.pace.price is not None and not self.fixed:
            return {name: gone.index_fill(0, self.alphas[name].argmax(), False) for name, gone in self.shut().items()}
        return cheapest({name: self.law.stays(alpha.detach()) for name, alpha in self.alphas.items()}, self.kinds, wanted)

    @torch.no_grad()
    def finish(self, model: Any, wanted: int) -> dict[str, Tensor]:
        """Cut the units that go out of a model and fold the others' gates into the weights that read them, in place; see `chosen`."""
        gone = self.chosen(wanted)
        for name, kind in self.kinds.items():
            kind.reads.weight.mul_(spread(self.law.folded(self.alphas[name]), kind))
            if bool(gone[name].any()):
                kind.cut(model, (~gone[name]).nonzero().squeeze(1))
        return gone


def compared(share: Tensor, alphas: Iterable[nn.Parameter]) -> Tensor:
    """Median of |gradient of α| / |∂share/∂α| over the gates whose draw left them a gradient, a scalar; 1 where none did."""
    found = [(alpha, alpha.grad) for alpha in alphas if alpha.grad is not None]
    slopes = torch.autograd.grad(share, [alpha for alpha, _ in found])
    ratios = torch.cat([(gradient / slope).abs().flatten() for (_, gradient), slope in zip(found, slopes, strict=True)])
    ratios = ratios[torch.isfinite(ratios) & (ratios > 0)]
    return ratios.median() if len(ratios) else torch.ones((), device=ratios.device)


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
