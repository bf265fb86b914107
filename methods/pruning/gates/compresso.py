"""Compresso: gates learn beside low-rank adapters on queries and values, with a prompt before each text that tells the model of it.

    W' = W + α/r · B A       A [r, in] random, B [out, r] zero at the start      for the projections to queries and values

W is frozen, A, B and the gates learn. There are gates on heads, channels and hidden features, none on whole layers; size and Lagrangian
are those of CoFi (`nested`, `core.learning.gates`). The loss is the cross entropy of the text alone, not of the prompt.

The paper trains on instructions, with a long prompt of its own wording, which stands before each text at inference too. Here the text is
that of the calibration, and the prompt a short one in other words, while pruning alone; fine-tuning after the cut is another step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel
from slimbench.methods.core.learning.beside import Beside
from slimbench.methods.pruning.gates.cofi import NestedPruning

if TYPE_CHECKING:
    from torch import Tensor

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
    version = 2
    citation = Citation("Compresso", year=2023, arxiv="2310.05015")

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

        from slimbench.methods.core.training import cut, train
        from slimbench.methods.pruning.gates import learned
        from slimbench.methods.pruning.gates.nested import NestedGates

        model = learned.load(dense).requires_grad_(False)
        before, gates = model.num_parameters(), NestedGates(model, self.ratio, self.pace(), parts=())
        self.prepare(gates, dense)
        adapters = self.beside(model, dense)
        prompt = torch.tensor(dense.tokenizer()(self.prompt)["input_ids"] if self.prompt else [], dtype=torch.int64, device=model.device)
        loss, parameters = self.objective(model, gates, adapters, prompt, dense), adapters.parameters | gates.parameters
        done = train(self, parameters, loss, cut(calibration.ids, self.length), dense, gates)
        adapters.merge()
        return self.finished(model, gates, done, before, dense, out)

    def beside(self, model: Any, dense: DenseModel) -> Beside:
        """The adapters of queries and values, scaled by alpha / rank."""
        from slimbench.methods.core.architecture.anatomy import anatomy

        layers = {name: layer for block in anatomy(model) for name, layer in block.named(block.attention.q, block.attention.v).items()}
        return Beside(layers, self.rank, self.alpha / self.rank, self.seed + dense.seed)

    def objective(self, model: Any, gates: NestedGates, adapters: Beside, prompt: Tensor, dense: DenseModel) -> Loss:
        """The loss of a model with adapters whose gates are drawn anew each time."""
        import torch

        from slimbench.methods.core.learning.teachers import teacher_of
        from slimbench.methods.core.losses import cross_entropy, soft_cross_entropy

        teacher = teacher_of(dense) if self.loss == "distillation" else None

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
