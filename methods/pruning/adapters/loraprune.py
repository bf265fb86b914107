"""LoRAPrune: what a weight matters is told from the gradients of the adapter beside it, since the weight itself has none.

With an adapter B A beside a frozen weight W (Zhang et al., arXiv 2305.18403), a step of rate 1 down the gradients of A and B changes
their product by −ĝ, which stands for the gradient of W:

    ĝ = ∂L/∂B A + B ∂L/∂A − ∂L/∂B ∂L/∂A        I_ij = ((W + s B A)_ij ĝ_ij)²

I is summed over the weights of each structure, a channel or a group of heads, layer by layer, and the sums of a layer are divided by
their norm. A structure's score G is the sum over its layers, and over steps

    Ḡ_t = λ Ḡ_(t−1) + (1 − λ) G_t

From the first to the last step of pruning ever more structures are masked by a cubic schedule, those of the lowest Ḡ in each layer; what
is masked stays so. In the end adapters are merged and masked structures cut out. A, B and their gradients are those before the update.

The norm, the blocks that are left alone (the first tenth and the last one) and layers that lose alike are the authors' program's, which
takes |·| where the paper has the square.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, ModelShape, Unsupported
from slimbench.methods.core.learning.beside import Beside
from slimbench.methods.core.learning.hooks import Hooks
from slimbench.methods.pruning.adapters.merging import AdapterPruning, estimate, finished, goals, layers_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from slimbench.methods.core.architecture.units import Structures
    from slimbench.methods.core.learning.gradual import Cubic


@dataclass(frozen=True)
class LoRAPrune(AdapterPruning):
    """Pruning of LoRAPrune, to less than a channel more than was asked for.

    Attributes:
        keep_first: Share of the blocks, counted from the first and rounded down, that keep their structures; so does the last block.
        memory: λ.
    """

    name = "loraprune"
    citation = Citation("LoRAPrune", year=2023, arxiv="2305.18403", covers=("pruning/loraprune",))

    keep_first: float = 0.1
    memory: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.keep_first < 1:
            raise ValueError(f"keep_first must be at least 0 and below 1, not {self.keep_first}")
        if not 0 <= self.memory < 1:
            raise ValueError(f"memory must be at least 0 and below 1, not {self.memory}")

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        if not self.pruned(shape.num_layers):
            raise Unsupported(f"no block of {shape.num_layers} is left between the first and the last ones that are kept")

    def pruned(self, blocks: int) -> range:
        """Indices of the blocks that lose structures."""
        return range(int(self.keep_first * blocks), blocks - 1)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.architecture.anatomy import anatomy
        from slimbench.methods.core.architecture.units import structures
        from slimbench.methods.core.learning import trained
        from slimbench.methods.core.learning.gates import multiplied
        from slimbench.methods.core.training import cut, objective, train

        model: Any = trained.load(dense)
        blocks = anatomy(model)
        kinds = {block.name_of(kind.reads): kind for block in blocks for kind in structures(block)}
        open_ = [blocks[index] for index in self.pruned(len(blocks))]
        prunable = {name: kinds[name] for block in open_ for name in (block.name_of(kind.reads) for kind in structures(block))}
        wanted = goals(kinds, prunable, self.ratio)
        beside = Beside(layers_of(kinds, model), self.rank, self.alpha / self.rank, self.seed + dense.seed)
        hooks = Importance(beside, prunable, wanted, self.growth, self.memory)
        plain = objective(self, model, dense)

        def loss(ids: Tensor) -> Tensor:
            with beside.added(), multiplied(prunable, hooks.gates):
                return plain(ids)

        done = train(self, beside.parameters, loss, cut(calibration.ids, self.length), dense, hooks)
        beside.merge()
        span = self.pruned(len(blocks))
        return finished(model, self, hooks.gone, done, dense, out, blocks_pruned=[span.start, span.stop - 1])


class Importance(Hooks):
    """Scores of structures, and which of them are masked.

    Attributes:
        averages: Ḡ [count] of each kind, by the full name of the layer that reads it; so are `gone`, true where one is masked.
    """

    def __init__(self, beside: Beside, kinds: Mapping[str, Structures], wanted: Mapping[str, int], growth: Cubic, memory: float) -> None:
        """Nothing is masked at first.

        Args:
            wanted: How many structures of each kind are masked in the end.
            growth: What share of them is after a step.
            memory: λ.
        """
        import torch

        self.beside, self.kinds, self.wanted, self.growth, self.memory = beside, dict(kinds), wanted, growth, memory
        self.names = {layer: name for name, layer in beside.layers.items()}
        device = {name: kind.reads.weight.device for name, kind in kinds.items()}
        self.averages = {name: torch.zeros(kind.count, device=device[name]) for name, kind in kinds.items()}
        self.gone = {name: torch.zeros(kind.count, dtype=torch.bool, device=device[name]) for name, kind in kinds.items()}

    @property
    def gates(self) -> dict[str, Tensor]:
        """What each structure's outputs are multiplied by, 0 or 1."""
        return {name: (~mask).float() for name, mask in self.gone.items()}

    def weights(self, layer: nn.Linear) -> Tensor:
        """I [out, in] of a layer, of the gradients that are there."""
        name = self.names[layer]
        first, second = self.beside.pairs[name]
        assert first.grad is not None and second.grad is not None
        gradient = estimate(first.detach(), second.detach(), first.grad, second.grad)
        return ((layer.weight.detach() + self.beside.change(name)) * gradient).square()

    def scores(self, kind: Structures) -> Tensor:
        """G [count] of the structures of a kind."""
        parts = [self.weights(layer).view(kind.count, -1).sum(1) for layer in kind.makes]
        parts.append(self.weights(kind.reads).T.reshape(kind.count, -1).sum(1))
        scores = parts[0].new_zeros(kind.count)
        for part in parts:
            scores += part / part.norm().clamp_min(1e-30)
        return scores

    def after_backward(self, step: int) -> None:
        for name, kind in self.kinds.items():
            self.averages[name].mul_(self.memory).add_(self.scores(kind), alpha=1 - self.memory)

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        import torch

        from slimbench.methods.core.masks import lowest

        share = self.growth.at(step + 1)
        for name, values in self.averages.items():
            masked = values.masked_fill(self.gone[name], -torch.inf)
            self.gone[name] = lowest(masked, int(share * self.wanted[name] + 0.5))

    def state(self) -> dict[str, Tensor]:
        parts = {"average": self.averages, "gone": self.gone}
        return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, values in self.averages.items():
            values.copy_(state[f"average/{name}"])
            self.gone[name] = state[f"gone/{name}"].to(values.device)
