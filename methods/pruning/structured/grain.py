"""GRAIN: units inside of heads go, so that heads get the size that they need, or none.

Units are channels, and dimensions of the values of a head with the columns of the output projection that read them. With W the weights
[out, in] of the layer that reads a unit j (Yang et al., arXiv 2212.07634)

    I_j = | Σ_i W_ij ∂L/∂W_ij |                     the sum before the absolute value; over all inputs that the unit makes
    Ī_t = β Ī_(t−1) + (1 − β) I_t · tanh(D_head / α) · tanh(D_layer / α)

where D is the share of its units that a head, and that the layer, still has: what is nearly empty is emptied. By a cubic schedule the units
of the lowest Ī go, of all layers by one threshold, while all weights learn, from the predictions and the hidden states of the model that
the pipeline began with. I is of the gradients of the first loss alone: the second one pulls at weights, not at the choice of units.

The paper prunes the dimensions of queries and keys too; rotary embeddings turn these in pairs, so they stay here, and go where no dimension
of the values is left. Query heads that share a value head share its dimensions. Attention is computed at the full width of a head, with
zeros in the place of what has gone: parameters are saved, and no cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import EDITED, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.learning.gradual import Cubic
from slimbench.methods.core.learning.hooks import Hooks
from slimbench.methods.core.settings import Smaller
from slimbench.methods.core.training import TrainingSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from slimbench.methods.core.training import Loss
    from slimbench.methods.pruning.structured.dimensions import Units


@dataclass(frozen=True)
class GRAIN(TrainingSettings, Smaller, Method):
    """Dimensions of values and channels; queries and keys go with the last dimension of their group.

    Attributes:
        ratio: Share of the parameters of all heads and channels that goes, to less than a group of heads more.
        begin: Share of the steps before which nothing goes.
        end: Share of the steps after which all has gone that shall.
        memory: β.
        density: α; the smaller, the later a head counts as nearly empty.
        hidden: Weight of the loss of hidden states.
    """

    name = "grain"
    citation = Citation("GRAIN", year=2022, arxiv="2212.07634", covers=("pruning/grain-pruning-adapter",))
    needs = Needs(calibration=True, training=True)
    produces = EDITED
    least_steps = 1000

    steps: int = 60
    loss: Literal["distillation", "nll"] = "distillation"
    begin: float = 0.1
    end: float = 0.8
    memory: float = 0.9
    density: float = 0.1
    hidden: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.begin < self.end <= 1:
            raise ValueError(f"begin and end must be shares of the steps, the first below the second, not {self.begin} and {self.end}")
        if not 0 <= self.memory < 1:
            raise ValueError(f"memory must be at least 0 and below 1, not {self.memory}")
        if not self.density > 0:
            raise ValueError(f"density must be positive, not {self.density}")
        if self.hidden < 0:
            raise ValueError(f"hidden must not be negative, not {self.hidden}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.architecture.anatomy import anatomy
        from slimbench.methods.core.training import cut as windows_of
        from slimbench.methods.core.training import train
        from slimbench.methods.pruning.gates import learned
        from slimbench.methods.pruning.structured import dimensions

        model = learned.load(dense)
        before = model.num_parameters()
        kinds: dict[str, Units] = {}
        for block in anatomy(model):
            kinds |= dimensions.units_of(block)
        growth = Cubic(0.0, 1.0, round(self.begin * self.steps), round(self.end * self.steps))
        hooks = Inside(kinds, self.ratio, growth, self.memory, self.density)
        hooks.choose(1.0)  # refuses before the work what cannot go
        parameters = dict(model.named_parameters())
        done = train(self, parameters, self.objective(model, hooks, dense), windows_of(calibration.ids, self.length), dense, hooks)
        dimensions.cut(model, kinds, hooks.gone)
        learned.save(model, dense, out)
        values = {name: kind for name, kind in kinds.items() if kind.frame}
        details: dict[str, Any] = {
            "parameters_before": before,
            "dimensions_by_head": {name: (~hooks.gone[name]).view(kind.groups, -1).sum(1).tolist() for name, kind in values.items()},
            "channels_by_block": [int((~hooks.gone[name]).sum()) for name in kinds if name not in values],
        }
        return done.added_to(learned.claim(model, self, details))

    def objective(self, model: Any, hooks: Inside, dense: DenseModel) -> Loss:
        """Predictions and hidden states; of the first the hooks see the gradients that choose units."""
        import torch

        from slimbench.methods.core.learning.teachers import teacher_of
        from slimbench.methods.core.losses import next_token, soft_cross_entropy, square_head
        from slimbench.methods.pruning.structured.dimensions import masked

        teacher = teacher_of(dense)

        def loss(ids: Tensor) -> Tensor:
            with masked(hooks.kinds, hooks.gone), torch.autocast(dense.device, torch.bfloat16, enabled=dense.dtype == "bfloat16"):
                made = model(input_ids=ids, use_cache=False, output_hidden_states=True)
            with torch.no_grad():
                wanted = teacher(input_ids=ids, use_cache=False, output_hidden_states=True)
            first = next_token(made.logits, ids) if self.loss == "nll" else soft_cross_entropy(made.logits, wanted.logits)
            if torch.is_grad_enabled():
                hooks.see(first)
            return first + self.hidden * square_head(made.hidden_states[1:], wanted.hidden_states[1:]) / len(made.hidden_states[1:])

        return loss


class Inside(Hooks):
    """Importance of units, and which of them have gone.

    Attributes:
        averages: Ī [count] of each kind, by the full name of the layer that reads it; so are `gone`, true where one has gone.
        sums: W ∘ ∂L/∂W of the step that is on, summed over the inputs of each unit, [count].
    """

    def __init__(self, kinds: Mapping[str, Units], ratio: float, growth: Cubic, memory: float, density: float) -> None:
        import torch

        self.kinds, self.growth, self.memory, self.density = dict(kinds), growth, memory, density
        self.averages = {name: torch.zeros(kind.count, device=kind.reads.weight.device) for name, kind in kinds.items()}
        self.gone = {name: torch.zeros_like(values, dtype=torch.bool) for name, values in self.averages.items()}
        self.sums = {name: torch.zeros_like(values) for name, values in self.averages.items()}
        self.whole = self.size(self.gone)
        self.lost = round(ratio * self.whole)

    def size(self, gone: Mapping[str, Tensor]) -> int:
        """Parameters of all heads and channels without the units of some masks."""
        return sum(self.kinds[name].left(mask) for name, mask in gone.items())

    def see(self, loss: Tensor) -> None:
        """Take in the gradients of the loss of a piece of a batch."""
        import torch

        weights = [kind.reads.weight for kind in self.kinds.values()]
        for (name, kind), gradient in zip(self.kinds.items(), torch.autograd.grad(loss, weights, retain_graph=True), strict=True):
            self.sums[name] += kind.of_inputs((kind.reads.weight.detach() * gradient).sum(0))

    def densities(self, name: str) -> Tensor:
        """tanh(D_head / α) · tanh(D_layer / α), [count]; channels have no heads."""
        kind = self.kinds[name]
        kept = (~self.gone[name]).float().view(kind.groups, kind.width)
        whole = (kept.mean() / self.density).tanh()
        if kind.groups == 1 and not kind.frame:
            return whole.expand(kind.count)
        return (whole * (kept.mean(1) / self.density).tanh()).repeat_interleave(kind.width)

    def after_backward(self, step: int) -> None:
        for name, found in self.sums.items():
            self.averages[name].mul_(self.memory).add_(found.abs() * self.densities(name), alpha=1 - self.memory)
            found.zero_()

    def choose(self, share: float) -> dict[str, Tensor]:
        """Masks of so many units that a share of what goes in the end has gone; of each layer one unit stays, and what has gone is gone.

        Raises:
            Unsupported: One unit of each layer alone is more than what may be left.
        """
        import torch

        from slimbench.methods.pruning.low_rank.rank_gates import fewest

        scores = {name: values.masked_fill(self.gone[name], -torch.inf) for name, values in self.averages.items()}
        return fewest(scores, self.size, self.whole - round(share * self.lost))

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        if self.growth.begin < step + 1 <= self.growth.end:
            self.gone = self.choose(self.growth.at(step + 1))

    def state(self) -> dict[str, Tensor]:
        parts = {"average": self.averages, "gone": self.gone}
        return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, values in self.averages.items():
            values.copy_(state[f"average/{name}"])
            self.gone[name] = state[f"gone/{name}"].to(values.device)
