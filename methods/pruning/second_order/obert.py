"""Optimal BERT Surgeon: weights, or groups of consecutive weights, go by what they cost the loss, in several prunes with training between.

At each of k prunes the saliency of a group Q among the weights w and the update of all that are left are (`fisher`)

    ½ w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q        - F⁻¹_:Q ([F⁻¹]_QQ)⁻¹ w_Q,  added over the groups that go

with F = λ I + 1/m Σ g gᵀ in blocks of B weights and one threshold for all layers. What two groups that go do to each other is left
out, as in the paper (arXiv 2203.07259). Prune i = 0 … k - 1 goes to the sparsity

    s + (s₀ - s) (1 - i / (k - 1))³

and all weights that are left are then trained on the dense model's distribution, zeros locked, the learning rate falling anew each time.
The first mask of the authors' recipes takes 30 or 70 %. They tune BERT on a task for 30 epochs; here a decoder learns from the
calibration text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from slimbench.methods.base import HUGGINGFACE, Calibration, Citation, Claim, DenseModel, ModelShape, Needs, Unsupported
from slimbench.methods.core.layers import block_linears, check_calibration
from slimbench.methods.core.masks import zero_fraction
from slimbench.methods.core.training import Trained, TrainingSettings
from slimbench.methods.formats.huggingface import save_dense
from slimbench.methods.pruning.second_order.obs import BlockFisher

_POINTS = 100  # of a loss curve


@dataclass(frozen=True, kw_only=True)
class OptimalBertSurgeon(TrainingSettings, BlockFisher):
    """Gradual pruning by the Fisher matrix in blocks, with training after each prune.

    Attributes:
        steps: Updates after each prune.
        initial: s₀: sparsity of the first of several prunes, above 0 and `sparsity` at most.
        prunes: k: how often weights go.
        group: Consecutive weights of a row that go together; must divide `block_size` and the inputs of each layer.
    """

    name = "obert"
    citation = Citation("Optimal BERT Surgeon", year=2022, arxiv="2203.07259", covers=("pruning/optimal-bert-surgeon",))
    needs = Needs(calibration=True, training=True)
    least_steps = 1000

    sparsity: float = 0.9
    samples: int = 32
    initial: float = 0.7
    prunes: int = 4
    group: int = 1
    learning_rate: float = 8e-5
    schedule: Literal["cosine", "linear", "constant"] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.initial <= self.sparsity:
            raise ValueError(f"initial must be above 0 and at most the sparsity {self.sparsity}, not {self.initial}")
        if self.prunes < 1:
            raise ValueError(f"prunes must be at least 1, not {self.prunes}")
        if self.group < 1 or self.block_size % self.group:
            raise ValueError(f"group must be at least 1 and divide the block_size {self.block_size}, not {self.group}")

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        for width in shape.widths or (shape.hidden_size, shape.intermediate_size):
            self._check_inputs(width)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.core.learning.hooks import Locked
        from slimbench.methods.core.training import cut, objective, train
        from slimbench.methods.core.walk import passes
        from slimbench.methods.pruning.second_order.fisher import Blocks, prune

        check_calibration(calibration, dense.shape)
        model = dense.load(dtype=torch.float32)
        layers = block_linears(model)
        for layer in layers.values():
            self._check_inputs(layer.in_features)
        blocks = Blocks(self.block_size, self.dampening, self.group, joint=False)
        loss, windows = objective(self, model, dense), cut(calibration.ids, self.length)
        parameters, done = dict(model.named_parameters()), []
        reports = passes(dense.progress, 2 * self.prunes)
        for index, sparsity in enumerate(self.sparsities()):
            gone = prune(model, layers, calibration.ids[: self.samples], sparsity, blocks, reports[2 * index])
            model.requires_grad_(True)
            locked = Locked(parameters, {f"{name}.weight": mask for name, mask in gone.items()})
            kept = dense.checkpoints / f"prune-{index}" if dense.checkpoints else None
            phase = replace(dense, progress=reports[2 * index + 1], checkpoints=kept)
            trained = train(self, parameters, loss, windows, phase, locked)
            done.append(replace(trained, parameters=trained.parameters - locked.count))
        dtype = getattr(torch, dense.dtype)
        model.to(dtype)
        model.config.dtype = dtype
        save_dense(model, out)
        teacher = "the model that the pipeline began with" if self.loss == "distillation" else None
        details = {"sparsities": [round(sparsity, 4) for sparsity in self.sparsities()]}
        return _joined(done).added_to(Claim(HUGGINGFACE, sparsity=zero_fraction(layers), teacher=teacher, details=details))

    def sparsities(self) -> list[float]:
        """Of all layers together after each prune."""
        from slimbench.methods.core.learning.gradual import Cubic

        schedule = Cubic(self.initial, self.sparsity, 0, max(1, self.prunes - 1))
        return [schedule.at(index) for index in (range(self.prunes) if self.prunes > 1 else [1])]

    def _check_inputs(self, width: int) -> None:
        if width % self.group:
            raise Unsupported(f"group {self.group} does not divide the input features {width}")


def _joined(phases: Sequence[Trained]) -> Trained:
    """Several trainings of the same steps as one; its parameters are those that learned in the last."""
    steps = phases[0].curve[-1][0]
    curve = [(index * steps + step, loss) for index, phase in enumerate(phases) for step, loss in phase.curve]
    thinned = curve[:: math.ceil(len(curve) / (_POINTS - 1))]
    last = phases[-1]
    points = thinned if thinned[-1] == curve[-1] else [*thinned, curve[-1]]
    tokens, start = sum(phase.tokens for phase in phases), phases[0].start_sha256
    return Trained(tokens, last.parameters, tuple(points), last.loss_after, start_sha256=start, teacher_sha256=last.teacher_sha256)
