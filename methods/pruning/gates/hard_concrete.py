"""Hard concrete gates on weights, on heads, and on heads and channels (the law of the gates: `core.learning.gates`).

    L0         a gate on each weight: W ⊙ z, with the penalty λ Σ P(z ≠ 0) over all weights (arXiv 1712.01312)
    Voita      a gate on each head, the same penalty over heads, β = 0.33 (arXiv 1905.09418)
    McCarley   gates on heads and on channels, distilled from the dense model (arXiv 1910.06360)

All three set a price λ on an open gate and see what is left; `price` of the first two is that. Without one there is a budget: with the
share ŝ of what is expected to go, (1 − ŝ) · n is that sum of P(z ≠ 0), weighted by the parameters of the units where kinds are mixed, so
that a multiplier of ŝ is such a price; it climbs until the budget is met, and the units of the lowest P(z ≠ 0) go in the end, to the unit.
Weights learn with their gates. A gate on a head is one on a key and a value head with the query heads that share them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import HUGGINGFACE, Calibration, Citation, Claim, DenseModel, ModelShape
from slimbench.methods.core.masks import check_sparsity
from slimbench.methods.pruning.gates.learned import Cut, Priced, going

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.core.learning.gates import Gates


@dataclass(frozen=True)
class L0Weights(Priced):
    """A gate on each weight of the linear layers in the blocks. Takes eight numbers of four bytes a weight.

    Attributes:
        sparsity: Fraction of these weights that becomes zero, above 0 and below 1; layers have different ones. With a price it is not used.
    """

    name = "l0-weights"
    version = 2
    citation = Citation("L0 regularization", year=2017, arxiv="1712.01312", covers=("pruning/l0-regularization-hard-concrete",))

    sparsity: float = 0.5
    loss: Literal["distillation", "nll"] = "nll"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsity(self.sparsity, None)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.layers import block_linears
        from slimbench.methods.core.masks import zero_fraction
        from slimbench.methods.core.training import cut, objective, train
        from slimbench.methods.pruning.gates import learned
        from slimbench.methods.pruning.gates.weights import WeightGates

        model = learned.load(dense)
        layers = block_linears(model)
        gates = WeightGates(layers, self.sparsity, self.pace(self.price))
        self.control(gates, gates.chosen, dense)
        plain = objective(self, model, dense)

        def loss(ids: Tensor) -> Tensor:
            with gates.drawn():
                return plain(ids) + gates.penalty()

        done = train(self, learned.learning(model, gates), loss, cut(calibration.ids, self.length), dense, gates)
        zeros = gates.finish()
        learned.save(model, dense, out)
        details = learned.told(gates, zeros / gates.total)
        return done.added_to(Claim(HUGGINGFACE, sparsity=zero_fraction(layers), teacher=learned.teacher(self), details=details))


@dataclass(frozen=True)
class GatedUnits(Cut):
    """Gates on units of the blocks, of which each block keeps one of each kind."""

    def fitted(self, model: Any, gates: Gates, wanted: int, calibration: Calibration, dense: DenseModel, out: Path) -> Claim:
        """Train a model and its gates, cut so many parameters of units, and write it."""
        from slimbench.methods.core.architecture.units import kinds_of
        from slimbench.methods.core.training import cut, objective, train
        from slimbench.methods.pruning.gates import learned

        gates.chosen(wanted)  # refuses before the work what cannot go
        self.control(gates, lambda: gates.chosen(wanted), dense)
        plain = objective(self, model, dense)

        def loss(ids: Tensor) -> Tensor:
            with gates.drawn():
                return plain(ids) + gates.penalty()

        done = train(self, learned.learning(model, gates), loss, cut(calibration.ids, self.length), dense, gates)
        before, total = model.num_parameters(), gates.total
        gates.finish(model, wanted)
        kinds = kinds_of(model)
        gone = 1 - sum(_size({name: kinds[name] for name in gates.kinds}).values()) / total
        learned.save(model, dense, out)
        details: dict[str, Any] = {"parameters_before": before, **learned.left(kinds), **learned.told(gates, gone)}
        return done.added_to(learned.claim(model, self, details))


@dataclass(frozen=True)
class HeadGates(Priced, GatedUnits):
    """Gates on heads alone.

    Attributes:
        ratio: Share of all groups of heads that goes, rounded to whole ones, at least one. With a price it is not used.
    """

    name = "voita-heads"
    version = 3
    citation = Citation("Analyzing multi-head self-attention", year=2019, arxiv="1905.09418", covers=("pruning/voita-et-al",))

    ratio: float = 0.4
    loss: Literal["distillation", "nll"] = "nll"

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        going(self.ratio, shape.num_kv_heads * shape.num_layers, shape.num_layers)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.architecture.units import price
        from slimbench.methods.core.learning.gates import Gates, HardConcrete
        from slimbench.methods.pruning.gates import learned

        model = learned.load(dense)
        kinds = learned.groups_of(model)
        groups = sum(kind.count for kind in kinds.values())
        gone = going(self.ratio, groups, len(kinds))
        gates = Gates(kinds, gone / groups, self.pace(self.price), HardConcrete(temperature=0.33))
        return self.fitted(model, gates, gone * price(next(iter(kinds.values()))), calibration, dense, out)


@dataclass(frozen=True)
class HeadsAndChannels(GatedUnits):
    """Gates on heads and on channels, under one budget of parameters where the paper has a price for each kind.

    Attributes:
        ratio: Share of the parameters of all heads and channels that goes, to less than one of them more.
    """

    name = "mccarley"
    version = 3
    citation = Citation("Structured pruning of a BERT-based question answering model", year=2019, arxiv="1910.06360")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.architecture.units import kinds_of
        from slimbench.methods.core.learning.gates import Gates
        from slimbench.methods.pruning.gates import learned

        model = learned.load(dense)
        gates = Gates(kinds_of(model), self.ratio, self.pace())
        return self.fitted(model, gates, round(self.ratio * gates.total), calibration, dense, out)


def _size(kinds: Mapping[str, Any]) -> dict[str, int]:
    """Parameters of the units of each kind."""
    from slimbench.methods.core.architecture.units import price

    return {name: price(kind) * kind.count for name, kind in kinds.items()}
