"""LoSparse: a weight is a matrix of a low rank and a sparse one, of which whole rows go.

A weight W [out, in] begins as (Li et al., arXiv 2306.11222)

    W = U V + S         U V the product of that rank which is closest to W, S what it leaves

so that U V holds what the outputs have in common, and rows of S, each one output's own, can go. Their score is the mean over the row of
what weights of S matter, smoothed and with its uncertainty as in PLATON,

    I = |s ∂L/∂s|,   Ī ← β₁ Ī + (1 − β₁) I,   Ū ← β₂ Ū + (1 − β₂) |I − Ī|,   Γ_i = mean_j Ī_ij Ū_ij

and by a cubic schedule the rows of the lowest Γ go, of all layers by one threshold, while U, V, S and all else in the model learn. A row
that went may come back until the schedule is over. What is stored of a layer are U, V and the rows of S that are left; one of which so
many are left that this were more than its weight is stored as U V + S, and counted so.

The authors' program takes s after the update, and finds what went by rows whose sum is zero. Here masks say it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import EDITED, Calibration, Citation, Claim, DenseModel, Method, Needs, Unsupported
from slimbench.methods.core.learning.gradual import Cubic
from slimbench.methods.core.settings import Smaller
from slimbench.methods.core.training import TrainingSettings
from slimbench.methods.pruning.training.platon import Sensitivities

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LoSparse(TrainingSettings, Smaller, Method):
    """A pair of thin layers and some rows in the place of the linear layers of the blocks. Takes nine numbers of four bytes a weight.

    Attributes:
        ratio: Share of the parameters of the blocks that goes, to less than a row of one layer more.
        low_rank: Share of the parameters of a weight that U and V have.
        begin: Share of the steps before which nothing goes.
        end: Share of the steps after which all has gone that shall.
        importance_decay: β₁, from 0 to below 1.
        uncertainty_decay: β₂, from 0 to below 1.
        window: Steps over which I is averaged, and after which rows are chosen.
    """

    name = "losparse"
    citation = Citation("LoSparse", year=2023, arxiv="2306.11222", covers=("pruning/losparse",))
    needs = Needs(calibration=True, training=True)
    produces = EDITED
    least_steps = 1000

    ratio: float = 0.2
    loss: Literal["distillation", "nll"] = "nll"
    low_rank: float = 0.15
    begin: float = 0.1
    end: float = 0.8
    importance_decay: float = 0.85
    uncertainty_decay: float = 0.95
    window: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.low_rank < 1:
            raise ValueError(f"low_rank must be between 0 and 1, both excluded, not {self.low_rank}")
        if not 0 <= self.begin < self.end <= 1:
            raise ValueError(f"begin and end must be shares of the steps, the first below the second, not {self.begin} and {self.end}")
        for name in ("importance_decay", "uncertainty_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        if self.window < 1:
            raise ValueError(f"window must be at least 1, not {self.window}")

    def rank(self, shape: tuple[int, int]) -> int:
        """Of U and V for a weight of a shape (out, in): the program rounds up."""
        return math.ceil(self.low_rank * math.prod(shape) / sum(shape))

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.layers import block_linears
        from slimbench.methods.core.learning import adapters
        from slimbench.methods.core.training import cut, objective, train
        from slimbench.methods.pruning.gates import learned
        from slimbench.methods.pruning.low_rank.split import Split
        from slimbench.methods.pruning.low_rank.svd import block_sizes, shapes_of

        model = learned.load(dense)
        before, blocks, shapes = model.num_parameters(), block_sizes(model), shapes_of(model)
        weights = sum(math.prod(shape) for shape in shapes.values())
        budget = math.floor((1 - self.ratio) * sum(blocks) + 1e-6) - (sum(blocks) - weights)
        layers = {name: layer for name, layer in block_linears(model).items() if name in shapes}
        for layer in layers.values():
            layer.weight.requires_grad_(False)
        ranks = {name: self.rank(shape) for name, shape in shapes.items()}
        least = sum(min(ranks[name] * sum(shape), math.prod(shape)) for name, shape in shapes.items())
        if least > budget:
            raise Unsupported(f"{max(budget, 0)} parameters are fewer than the {least} that {len(shapes)} layers take at least")
        split = Split(layers, ranks)
        hooks = Rows(
            split.sparse,
            schedule=Cubic(0.0, 1.0, round(self.begin * self.steps), round(self.end * self.steps)),
            every=self.window,
            decays=(self.importance_decay, self.uncertainty_decay),
            split=split,
            budget=budget,
        )
        others = {name: value for name, value in model.named_parameters() if value.requires_grad}
        plain = objective(self, model, dense)

        def loss(ids: Tensor) -> Tensor:
            with adapters.computing(layers, split.product):
                return plain(ids)

        done = train(self, others | split.parameters, loss, cut(calibration.ids, self.length), dense, hooks)
        gone = {name: mask[:, 0] for name, mask in hooks.masks.items()}
        kinds = split.finish(model, gone)
        learned.save(model, dense, out)
        details: dict[str, Any] = {
            "layers": kinds,
            "rows_left": [sum(int((~mask).sum()) for mask in gone.values()), sum(len(mask) for mask in gone.values())],
            "kept_by_block": [round(left / whole, 4) for left, whole in zip(block_sizes(model), blocks, strict=True)],
            "parameters_before": before,
        }
        return done.added_to(learned.claim(model, self, details))


@dataclass
class Rows(Sensitivities):
    """Rows of S that go; masks are those of all their weights.

    Attributes:
        schedule: How much of what shall go has gone, 0..1.
        split: The layers.
        budget: Parameters that they may have in the end, biases left out.
    """

    split: Any = field(kw_only=True)
    budget: int = field(kw_only=True)

    def scores(self) -> Mapping[str, Tensor]:
        return {name: (importance * self.uncertainty[name]).mean(1) for name, importance in self.importance.items()}

    def choose(self, share: float) -> dict[str, Tensor]:
        """Masks of so many rows that the layers have no more than a budget that falls with the share to that of the end."""
        from slimbench.methods.pruning.low_rank.rank_gates import fewest

        whole = self.split.whole
        gone = fewest(self.scores(), self.split.size, whole - math.ceil(share * (whole - self.budget) - 1e-6), stays=0)
        return {name: mask.unsqueeze(1).expand(self.parameters[name].shape).contiguous() for name, mask in gone.items()}
