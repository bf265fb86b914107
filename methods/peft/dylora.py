"""DyLoRA: one adapter is trained for all ranks up to its own, so that its first parts serve alone (arXiv 2210.07558).

In each step a rank b is drawn evenly from 1 … r, and the layer multiplies with the first b rows of A and columns of B,

    W_b = W + α/b · B[:, :b] A[:b]        A [r, in] random, B [out, r] zero at the start; W is frozen

which are trained (the paper also freezes all of them but the last, and finds it worse). AdamW's moments go on moving the parts behind
b for some steps, as in the paper's program. The artefact is W_r, merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import DENSE, HUGGINGFACE, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.learning.hooks import Hooks
from slimbench.methods.core.settings import Adapters
from slimbench.methods.core.training import TrainingSettings

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from slimbench.methods.core.training import Trained


@dataclass(frozen=True)
class DyLoRA(Adapters, TrainingSettings, Method):
    """Adapters on all linear layers of the blocks, merged; a pruned weight is refused, since its zeros would be filled.

    Attributes:
        rank: Of the adapters, the highest that is drawn.
        alpha: The first b parts of an adapter are scaled by alpha / b.
    """

    name = "dylora"
    accepts = DENSE
    citation = Citation("DyLoRA", year=2022, arxiv="2210.07558", covers=("peft/dylora",))
    needs = Needs(calibration=True, training=True)

    rank: int = 8
    learning_rate: float = 4e-4

    def product(self, x: Tensor, reduce: Tensor, expand: Tensor, rank: int) -> Tensor:
        """What the first `rank` parts of an adapter add to the outputs [..., out] of a layer for inputs [..., in]."""
        from torch.nn import functional

        return self.alpha / rank * functional.linear(functional.linear(x, reduce[:rank]), expand[:, :rank])

    def train(
        self, model: PreTrainedModel, layers: dict[str, nn.Linear], ids: Tensor, dense: DenseModel
    ) -> tuple[dict[str, tuple[nn.Parameter, nn.Parameter]], Trained]:
        """Train adapters: the factors by layer, and what the training was."""
        import torch

        from slimbench.methods.core.learning import adapters, trained

        seed = self.seed + dense.seed
        generator, ranks = torch.Generator().manual_seed(seed), Ranks(self.rank, self.steps, seed)
        factors = adapters.learned({name: adapters.adapter(layer, self.rank, generator) for name, layer in layers.items()})

        def product(name: str, layer: nn.Linear, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, layer.weight, layer.bias) + self.product(x, *factors[name], ranks.now)

        with adapters.computing(layers, product):
            done = trained.fit(self, model, adapters.named(factors), ids, dense, ranks)
        return factors, done

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.core.layers import block_linears
        from slimbench.methods.core.learning import trained
        from slimbench.methods.peft import finetune

        model = trained.load(dense)
        layers = block_linears(model)
        finetune.check_zeros(layers)
        factors, done = self.train(model, layers, calibration.ids, dense)
        with torch.no_grad():
            for name, (reduce, expand) in factors.items():
                layers[name].weight += self.alpha / self.rank * (expand @ reduce)
        trained.save(model, dense, out)
        return done.added_to(Claim(HUGGINGFACE, teacher=trained.teacher(self), details={"rank": self.rank}))


@dataclass
class Ranks(Hooks):
    """The rank of each step, which depends on the seed and the step alone; once the last step is done, the highest.

    Attributes:
        most: The highest.
        steps: Of the training.
        now: That of the step that comes.
    """

    most: int
    steps: int
    seed: int
    now: int = field(init=False)

    def __post_init__(self) -> None:
        self.now = self.drawn(0)

    def drawn(self, step: int) -> int:
        """A rank from 1 to the highest, each as likely as the others."""
        import torch

        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return int(torch.randint(1, self.most + 1, (), generator=generator))

    def after_step(self, step: int, optimizer: Any) -> None:
        self.now = self.drawn(step + 1) if step + 1 < self.steps else self.most

    def state(self) -> dict[str, Tensor]:
        import torch

        return {"rank": torch.tensor(self.now)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.now = int(state["rank"])
