"""Compresso: gates learn beside low-rank adapters on queries and values, with a prompt before each text that tells the model of it.

    W' = W + α/r · B A       A [r, in] random, B [out, r] zero at the start      for the projections to queries and values

W is frozen, A, B and the gates learn. There are gates on heads, channels and hidden features, none on whole layers; size and Lagrangian
are those of CoFi (`nested`, `core.learning.gates`). The loss is the cross entropy of the text alone, not of the prompt.

The paper trains on instructions, with a long prompt of its own wording. Here the text is that of the calibration, and the prompt a short
one in other words; fine-tuning after the cut is another step of a pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel
from slimbench.methods.pruning.gates.cofi import NestedPruning

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slimbench.methods.core.training import Loss
    from slimbench.methods.pruning.gates.nested import NestedGates

PROMPT = (
    "Note to the model: while you read this, heads, channels and hidden features that you hardly need are being taken away from you. "
    "Rely on what stays, adapt step by step, and go on predicting the text as well as before.\n\n"
)


@dataclass(frozen=True)
class Compresso(NestedPruning):
    """Pruning of Compresso.

    Attributes:
        rank: r.
        alpha: α.
        prompt: What stands before each text; nothing where it is empty.
    """

    name = "compresso"
    citation = Citation("Compresso", year=2023, arxiv="2310.05015", covers=("pruning/compresso",))

    learning_rate: float = 5e-5
    loss: Literal["distillation", "nll"] = "nll"
    rank: int = 8
    alpha: float = 8.0
    prompt: str = PROMPT

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be positive, not {self.alpha}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.core.architecture.anatomy import anatomy
        from slimbench.methods.core.training import cut, train
        from slimbench.methods.pruning.gates import learned
        from slimbench.methods.pruning.gates.nested import NestedGates

        model = learned.load(dense).requires_grad_(False)
        before, gates = model.num_parameters(), NestedGates(model, self.ratio, parts=(), **self.pace())
        gates.check(self.wanted(gates))
        adapters = Adapters([layer for block in anatomy(model) for layer in (block.attention.q, block.attention.v)], self, dense)
        prompt = torch.tensor(dense.tokenizer()(self.prompt)["input_ids"] if self.prompt else [], dtype=torch.int64, device=model.device)
        loss, parameters = self.objective(model, gates, adapters, prompt, dense), adapters.parameters | gates.parameters
        done = train(self, parameters, loss, cut(calibration.ids, self.length), dense, gates)
        adapters.merge()
        return self.finished(model, gates, done, before, dense, out)

    def objective(self, model: Any, gates: NestedGates, adapters: Adapters, prompt: Tensor, dense: DenseModel) -> Loss:
        """The loss of a model with adapters whose gates are drawn anew each time."""
        import torch

        from slimbench.methods.core.losses import cross_entropy, soft_cross_entropy

        teacher = dense.load_original().requires_grad_(False) if self.loss == "distillation" else None

        def loss(ids: Tensor) -> Tensor:
            whole, before = torch.cat([prompt.expand(len(ids), -1), ids], dim=1), max(1, len(prompt))
            with gates.drawn(), adapters.added(), torch.autocast(dense.device, torch.bfloat16, enabled=dense.dtype == "bfloat16"):
                logits = model(input_ids=whole, use_cache=False).logits[:, before - 1 : -1]
            if teacher is None:
                return cross_entropy(logits, whole[:, before:]) + gates.penalty()
            with torch.no_grad():
                wanted = teacher(input_ids=whole, use_cache=False).logits[:, before - 1 : -1]
            return soft_cross_entropy(logits, wanted) + gates.penalty()

        return loss


class Adapters:
    """Low-rank factors beside frozen layers.

    Attributes:
        pairs: A [r, in] and B [out, r] of each layer.
    """

    def __init__(self, layers: list[nn.Linear], settings: Compresso, dense: DenseModel) -> None:
        import torch

        generator = torch.Generator().manual_seed(settings.seed + dense.seed)
        self.layers, self.scale = layers, settings.alpha / settings.rank
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        for layer in layers:
            bound, place = layer.in_features**-0.5, layer.weight.device
            first = torch.empty(settings.rank, layer.in_features).uniform_(-bound, bound, generator=generator)
            second = torch.zeros(layer.out_features, settings.rank, device=place)
            self.pairs.append((torch.nn.Parameter(first.to(place)), torch.nn.Parameter(second)))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What `train` gets, beside the gates."""
        return {f"adapters/{index}/{side}": value for index, pair in enumerate(self.pairs) for side, value in zip("AB", pair, strict=True)}

    @contextmanager
    def added(self) -> Iterator[None]:
        """Let the layers add what the factors make of their inputs for a while."""
        import torch

        def add(pair: tuple[Tensor, Tensor], _: Any, args: tuple[Tensor], made: Tensor) -> Tensor:
            linear = torch.nn.functional.linear
            return made + self.scale * linear(linear(args[0], pair[0]), pair[1])

        placed = [layer.register_forward_hook(partial(add, pair)) for layer, pair in zip(self.layers, self.pairs, strict=True)]
        try:
            yield
        finally:
            for hook in placed:
                hook.remove()

    def merge(self) -> None:
        """Add the products to the weights, in place."""
        import torch

        with torch.no_grad():
            for layer, (first, second) in zip(self.layers, self.pairs, strict=True):
                layer.weight.add_(self.scale * (second @ first))
