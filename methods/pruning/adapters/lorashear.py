"""LoRAShear: structures fade to zero, period by period, while adapters beside all others take up what they did.

With an adapter B A beside a frozen weight there is a group x_g of rows for each structure: those of its channel, or of its group of
heads, in the layers that make it. First it is seen which layers can bear it: in each, a share of its structures of the smallest norm is
masked, and those layers whose masks raise the loss most lose none. Then, after a warm-up, some more groups are redundant in each of some
periods, those of the lowest saliency, and in step t of the K of their period (LHSPG, Chen et al., arXiv 2310.18356)

    x̃_g = x_g + s B A_g − λ_g x_g / ‖x_g‖,    λ_g = ‖x_g‖ / (K − t),     x_g ← 0 if x̃_gᵀ x_g < ε ‖x_g‖², else x̃_g

so that a group without an adapter fades by (K − t − 1) / (K − t) and is zero after the last step. Its rows of B are zero from then on.
At the end of a period the adapters of the others are merged into their weights and begin anew. What is zero is cut out in the end.

The paper leaves the saliency open; here it is that of LoRAPrune (`loraprune`). Its last part, a recovery on a choice of the data that it
was trained on and then on instructions, is not here: after the last period the adapters go on learning on the same text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel
from slimbench.methods.core.learning.beside import Beside
from slimbench.methods.pruning.adapters.loraprune import Importance
from slimbench.methods.pruning.adapters.merging import AdapterPruning, finished, goals, layers_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from slimbench.methods.core.architecture.units import Structures

_WINDOWS = 4  # on which it is seen which layers can bear to lose structures


@dataclass(frozen=True)
class LoRAShear(AdapterPruning):
    """Pruning of LoRAShear, to less than a channel more than was asked for.

    Attributes:
        periods: In which structures fade.
        epsilon: ε; a group whose fading turns it by so much is zero at once.
        spared: γ, share of the layers of heads and of channels that lose nothing.
        memory: Decay of the averages of the saliency.
    """

    name = "lorashear"
    citation = Citation("LoRAShear", year=2023, arxiv="2310.18356", covers=("pruning/lorashear",))

    periods: int = 4
    epsilon: float = 0.0
    spared: float = 0.1
    memory: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.periods <= self.growth.end - self.growth.begin:
            raise ValueError(f"periods must be at least 1 and leave each a step, not {self.periods}")
        if not 0 <= self.epsilon < 1:
            raise ValueError(f"epsilon must be at least 0 and below 1, not {self.epsilon}")
        if not 0 <= self.spared < 1:
            raise ValueError(f"spared must be at least 0 and below 1, not {self.spared}")
        if not 0 <= self.memory < 1:
            raise ValueError(f"memory must be at least 0 and below 1, not {self.memory}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.architecture.units import kinds_of
        from slimbench.methods.core.learning import trained
        from slimbench.methods.core.training import cut, objective, train

        model: Any = trained.load(dense)
        kinds, windows = kinds_of(model), cut(calibration.ids, self.length)
        goals(kinds, kinds, self.ratio)  # refuses before the work what cannot go even where no kind is spared
        harm = deviations(model, kinds, windows[:_WINDOWS].to(model.device), self.ratio)
        order = sorted(kinds, key=harm.__getitem__)
        able = set(order[: len(order) - int(self.spared * len(order))])
        prunable = {name: kind for name, kind in kinds.items() if name in able}
        wanted = goals(kinds, prunable, self.ratio)
        beside = Beside(layers_of(kinds, model), self.rank, self.alpha / self.rank, self.seed + dense.seed)
        hooks = Shear(beside, prunable, wanted, self)
        plain = objective(self, model, dense)

        def loss(ids: Tensor) -> Tensor:
            with beside.added():
                return plain(ids)

        done = train(self, beside.parameters, loss, windows, dense, hooks)
        beside.merge()
        spared = [name for name in kinds if name not in able]
        return finished(model, self, hooks.gone, done, dense, out, layers_spared=spared)


def deviations(model: Any, kinds: Mapping[str, Structures], ids: Tensor, share: float) -> dict[str, float]:
    """By how much the loss of a text rises where a share of the structures of one kind, of the smallest norm, is masked."""
    import torch

    from slimbench.methods.core.learning.gates import multiplied
    from slimbench.methods.core.losses import next_token
    from slimbench.methods.core.masks import lowest

    found = {}
    with torch.no_grad():
        before = float(next_token(model(ids, use_cache=False).logits, ids))
        for name, kind in kinds.items():
            squares = {layer: layer.weight.detach().float().square() for layer in (*kind.makes, kind.reads)}
            gone = lowest(kind.scores(squares, "sum"), max(1, round(share * kind.count)))
            with multiplied({name: kind}, {name: (~gone).float()}):
                found[name] = float(next_token(model(ids, use_cache=False).logits, ids)) - before
    return found


class Shear(Importance):
    """Structures that fade, as many more in each period; nothing is masked, and the weights themselves change.

    Attributes:
        fading: The structures of the period that is on, as `gone` holds those of all.
    """

    def __init__(self, beside: Beside, kinds: Mapping[str, Structures], wanted: Mapping[str, int], settings: LoRAShear) -> None:
        import torch

        super().__init__(beside, kinds, wanted, settings.growth, settings.memory)
        self.periods, self.epsilon = settings.periods, settings.epsilon
        self.fading = {name: torch.zeros_like(mask) for name, mask in self.gone.items()}

    def place(self, step: int) -> tuple[int, int, int] | None:
        """The period of a step, its t and its K; None outside of the periods."""
        begin, end = self.growth.begin, self.growth.end
        if not begin <= step < end:
            return None
        edges = [begin + (end - begin) * period // self.periods for period in range(self.periods + 1)]
        period = max(index for index in range(self.periods) if edges[index] <= step)
        return period, step - edges[period], edges[period + 1] - edges[period]

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        if (found := self.place(step)) is not None:
            period, t, length = found
            if t == 0:
                self.choose(period)
            for name in self.kinds:
                self.fade(name, length - t)
        for name, kind in self.kinds.items():
            self.still(kind, self.gone[name], optimizer)
        if found is not None and found[1] == found[2] - 1:
            self.beside.merge()

    def choose(self, period: int) -> None:
        """The structures that fade in a period."""
        import torch

        from slimbench.methods.core.masks import lowest

        for name, values in self.averages.items():
            count = int((period + 1) * self.wanted[name] / self.periods + 0.5)
            chosen = lowest(values.masked_fill(self.gone[name], -torch.inf), count)
            self.fading[name], self.gone[name] = chosen & ~self.gone[name], chosen

    def fade(self, name: str, left: int) -> None:
        """A step of the structures that fade: `left` is K − t."""
        import torch

        kind, chosen = self.kinds[name], self.fading[name]
        if not bool(chosen.any()):
            return
        with torch.no_grad():
            groups, trials = [], []
            for layer in kind.makes:
                rows = layer.weight.view(kind.count, -1)
                groups.append(rows)
                trials.append(rows * ((left - 1) / left) + self.beside.change(self.names[layer]).view(kind.count, -1))
            inner = sum((trial * rows).sum(1) for trial, rows in zip(trials, groups, strict=True))
            norm = sum(rows.square().sum(1) for rows in groups)
            zero = chosen & ((inner < self.epsilon * norm) | (left == 1))
            for layer, rows, trial in zip(kind.makes, groups, trials, strict=True):
                rows.copy_(torch.where(chosen.unsqueeze(1), trial.masked_fill(zero.unsqueeze(1), 0.0), rows))
                if layer.bias is not None:
                    of_group = layer.bias.view(kind.count, -1)
                    of_group[chosen] *= (left - 1) / left
                    of_group[zero] = 0.0

    def still(self, kind: Structures, gone: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Rows of B of what has faded, or fades, are zero, with their moments."""
        import torch

        if not bool(gone.any()):
            return
        with torch.no_grad():
            for layer in kind.makes:
                second = self.beside.pairs[self.names[layer]][1]
                rows = gone.repeat_interleave(len(second) // kind.count)
                second[rows] = 0.0
                for moment in optimizer.state[second].values():
                    if moment.shape == second.shape:
                        moment[rows] = 0.0

    def state(self) -> dict[str, Tensor]:
        weights = {f"weight/{name}": layer.weight for name, layer in self.beside.layers.items()}
        biases = {f"bias/{name}": layer.bias for name, layer in self.beside.layers.items() if layer.bias is not None}
        return super().state() | {f"fading/{name}": mask for name, mask in self.fading.items()} | weights | biases

    def load(self, state: Mapping[str, Tensor]) -> None:
        import torch

        super().load(state)
        self.fading = {name: state[f"fading/{name}"].to(mask.device) for name, mask in self.fading.items()}
        with torch.no_grad():
            for name, layer in self.beside.layers.items():
                layer.weight.copy_(state[f"weight/{name}"])
                if layer.bias is not None:
                    layer.bias.copy_(state[f"bias/{name}"])
