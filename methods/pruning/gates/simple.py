"""SIMPLE: masks on heads, channels and hidden features that begin at 1 and are drawn to 0 by an ℓ1 norm, under distillation.

    L = distillation(m) + λ Σ |m|                    (Tao et al., Findings of ACL 2023)

A mask m multiplies its unit, or its feature of the residual stream (`stream`); weights learn with the masks. Afterwards masks whose |m|
lies below one threshold go, and the others are multiplied into the weights. The threshold is the one at which heads, channels and features
together hold the budget: features first, as many as lie below it, then units, in the order of their |m|, to the unit.

Fine-tuning with the masks fixed, by the losses of logits and of hidden states, is another step of a pipeline (`sparse-ft` has both).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel
from slimbench.methods.core.learning.hooks import Group, Hooks
from slimbench.methods.core.settings import Smaller
from slimbench.methods.pruning.gates.learned import Learned

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class LassoMasks(Smaller, Learned):
    """Masks of SIMPLE.

    Attributes:
        ratio: Share of the parameters of all heads and channels that goes, to less than one of them more; features count by what they
            take from these.
        lasso: λ.
    """

    name = "simple"
    citation = Citation("SIMPLE", year=2023)
    produces = "edited"

    gate_rate: float = 0.01
    lasso: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lasso > 0:
            raise ValueError(f"lasso must be positive, not {self.lasso}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.training import cut, objective, train
        from slimbench.methods.pruning.gates import learned

        model = learned.load(dense)
        before, masks, plain = model.num_parameters(), Masks(model, self), objective(self, model, dense)
        whole, wanted = masks.nest.total, round(self.ratio * masks.nest.total)
        masks.check(wanted)

        def loss(ids: Tensor) -> Tensor:
            with masks.applied():
                return plain(ids) + self.lasso * masks.norm()

        parameters = dict(model.named_parameters()) | masks.parameters
        done = train(self, parameters, loss, cut(calibration.ids, self.length), dense, masks)
        final = masks.finish(model, wanted)
        gone = 1 - masks.nest.held(final) / whole
        learned.save(model, dense, out)
        details = {"parameters_before": before, **masks.nest.told(final), "gone": gone, "threshold": masks.threshold}
        return done.added_to(learned.claim(model, self, details))


class Masks(Hooks):
    """Masks on units and features.

    Attributes:
        nest: What they are on.
        values: m, by the names of `nest`.
        threshold: Below which features have gone; 0 before anything has.
    """

    def __init__(self, model: Any, settings: LassoMasks) -> None:
        import torch

        from slimbench.methods.pruning.gates.nested import Nest

        self.nest, self.settings, self.threshold = Nest(model), settings, 0.0
        sizes = {name: kind.count for name, kind in self.nest.kinds.items()} | {"hidden": self.nest.stream.width}
        device = self.nest.stream.head.weight.device
        self.values = {name: torch.nn.Parameter(torch.ones(size, device=device)) for name, size in sizes.items()}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What `train` gets, beside the weights of the model."""
        return {f"masks/{name}": value for name, value in self.values.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Units and features multiplied by their masks for a while."""
        with self.nest.applied(self.values):
            yield

    def norm(self) -> Tensor:
        """Σ |m|, a scalar."""
        import torch

        return torch.stack([value.abs().sum() for value in self.values.values()]).sum()

    def groups(self) -> Sequence[Group]:
        return (Group(tuple(self.parameters), self.settings.gate_rate / self.settings.learning_rate, weight_decay=0.0),)

    def check(self, wanted: int) -> None:
        """Raise `Unsupported` if so many parameters cannot go."""
        from slimbench.methods.core.architecture.units import cheapest

        cheapest({name: self.values[name].detach() for name in self.nest.kinds}, self.nest.kinds, wanted)

    def left(self, limit: Tensor) -> float:
        """Parameters of units that masks of at least a limit leave; of each kind, and of the features, the largest always stay."""
        stay = {name: ((value.abs() >= limit) | (value.abs() == value.abs().max())).double() for name, value in self.sizes.items()}
        return float(self.nest.size(stay))

    @property
    def sizes(self) -> Mapping[str, Tensor]:
        """m without gradients."""
        return {name: value.detach() for name, value in self.values.items()}

    def finish(self, model: Any, wanted: int) -> dict[str, Tensor]:
        """Cut so many parameters of units out of a model, in place, and return the final masks."""
        import torch

        from slimbench.methods.core.masks import lowest

        levels = torch.cat([value.abs() for value in self.sizes.values()]).unique()
        low, high, whole = 0, len(levels), self.nest.total
        while low < high:  # the highest level at which no more has gone than is wanted
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle < len(levels) and self.left(levels[middle]) >= whole - wanted else (low, middle - 1)
        self.threshold, hidden = float(levels[low]), self.sizes["hidden"].abs()
        features = lowest(hidden, min(int((hidden < levels[low]).sum()), len(hidden) - 1))
        scores = {name: self.sizes[name].abs() for name in self.nest.kinds}
        return self.nest.carve(model, wanted, self.sizes, scores, (), features)
