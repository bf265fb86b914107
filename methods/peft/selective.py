"""Training of some of a model's own parameters: biases, gains of norms, or all weights that pruning left.

    BitFit               y = W x + b: the biases b learn, of layers and of norms (arXiv 2106.10199)
    norms                the gains of norms learn, one of the parts of PERP (arXiv 2312.15230)
    sparse finetuning    all weights learn but those that are zero, which stay zero (arXiv 2310.06927)

A layer of the blocks without a bias, as in Llama, gets one of zeros for BitFit. Sparse finetuning has as its loss

    cross entropy  +  Σ_l mean (h_l − t_l)² / mean t_l²

with the hidden states h_l behind each block (behind the last norm for the last one) and those t_l of the teacher, the model that the
pipeline began with; means are over tokens and features. The second sum is SquareHead. The paper's program adds 2⁻⁷ to the
denominators; here nothing is added.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import DENSE, EDITED, HUGGINGFACE, Calibration, Citation, Claim, DenseModel, Method, Needs, Unsupported
from slimbench.methods.core.training import TrainingSettings

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.core.training import Loss


@dataclass(frozen=True)
class BitFit(TrainingSettings, Method):
    """Biases alone, those of norms and of the head, where there are any, included; the artefact is larger by those that it adds."""

    name = "bitfit"
    accepts = DENSE
    citation = Citation("BitFit", year=2021, arxiv="2106.10199", covers=("peft/bitfit",))
    needs = Needs(calibration=True, training=True)
    produces = EDITED

    learning_rate: float = 1e-3

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.core.architecture.surgery import add_bias, counts
        from slimbench.methods.core.layers import block_linears
        from slimbench.methods.core.learning import trained

        model = trained.load(dense)
        bare = {name: layer for name, layer in block_linears(model).items() if layer.bias is None}
        for name, layer in bare.items():
            add_bias(model, name, torch.zeros(layer.out_features))
        biases = {name: value for name, value in model.named_parameters() if name.endswith(".bias")}
        done = trained.fit(self, model, biases, calibration.ids, dense)
        trained.save(model, dense, out)
        return done.added_to(Claim(EDITED, **counts(model), teacher=trained.teacher(self), details={"biases_added": len(bare)}))


@dataclass(frozen=True)
class Norms(TrainingSettings, Method):
    """Gains of norms alone."""

    name = "norms"
    accepts = DENSE
    citation = Citation("PERP", year=2023, arxiv="2312.15230")
    needs = Needs(calibration=True, training=True)

    learning_rate: float = 5e-4
    schedule: Literal["cosine", "linear", "constant"] = "linear"

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.learning import trained
        from slimbench.methods.peft import finetune

        model = trained.load(dense)
        gains = {name: value for name, value in finetune.vectors(model).items() if name.endswith(".weight")}
        if not gains:
            raise Unsupported(f"{type(model).__name__} has no norms with gains")
        done = trained.fit(self, model, gains, calibration.ids, dense)
        trained.save(model, dense, out)
        return done.added_to(Claim(HUGGINGFACE, teacher=trained.teacher(self)))


@dataclass(frozen=True)
class SparseFinetune(TrainingSettings, Method):
    """All parameters but the zeros in the linear layers of the blocks, whatever pattern these have.

    Attributes:
        loss: The first term: the cross entropy with the text, or with the teacher's distribution.
    """

    name = "sparse-ft"
    accepts = DENSE
    citation = Citation("Sparse finetuning", year=2023, arxiv="2310.06927", covers=("pruning/sparse-finetuning",))
    needs = Needs(calibration=True, training=True)
    least_steps = 1000

    schedule: Literal["cosine", "linear", "constant"] = "linear"
    clip: float | None = None
    loss: Literal["distillation", "nll"] = "nll"

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.layers import block_linears
        from slimbench.methods.core.learning import trained
        from slimbench.methods.core.learning.hooks import Locked
        from slimbench.methods.core.learning.teachers import teacher_of
        from slimbench.methods.core.training import cut, train

        model = trained.load(dense)
        layers = block_linears(model)
        teacher = teacher_of(dense)
        _check_alike(model, teacher)
        parameters = dict(model.requires_grad_(True).named_parameters())
        locked = Locked.zeros({key: parameters[key] for key in (f"{name}.weight" for name in layers)})
        done = train(self, parameters, self.objective(model, teacher, dense), cut(calibration.ids, self.length), dense, locked)
        trained.save(model, dense, out)
        done = replace(done, parameters=done.parameters - locked.count)
        return done.added_to(Claim(HUGGINGFACE, teacher="the model that the pipeline began with"))

    def objective(self, model: Any, teacher: Any, dense: DenseModel) -> Loss:
        """Cross entropy and SquareHead of a model."""
        import torch

        from slimbench.methods.core.losses import next_token, soft_cross_entropy, square_head

        def loss(ids: Tensor) -> Tensor:
            with torch.autocast(dense.device, torch.bfloat16, enabled=dense.dtype == "bfloat16"):
                made = model(input_ids=ids, use_cache=False, output_hidden_states=True)
            with torch.no_grad():
                wanted = teacher(input_ids=ids, use_cache=False, output_hidden_states=True)
            first = next_token(made.logits, ids) if self.loss == "nll" else soft_cross_entropy(made.logits, wanted.logits)
            return first + square_head(made.hidden_states[1:], wanted.hidden_states[1:])

        return loss


def _check_alike(model: Any, teacher: Any) -> None:
    from slimbench.methods.formats.architecture.structure import blocks_of

    sizes = [(len(blocks_of(each)), each.get_input_embeddings().embedding_dim) for each in (model, teacher)]
    if sizes[0] != sizes[1]:
        said = [f"{blocks} blocks of {width} features" for blocks, width in sizes]
        raise Unsupported(
            f"hidden states of {said[0]} cannot be compared with those of {said[1]} of the model that the pipeline began with"
        )
