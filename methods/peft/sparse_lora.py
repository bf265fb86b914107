"""MaskLoRA and ScaleLoRA: low-rank adapters that are merged into a pruned weight without filling its zeros (PERP, arXiv 2312.15230).

    MaskLoRA     W' = W + M ∘ (α/r · B A)     M is 1 where W is not 0; A random, B zero at the start, as in LoRA
    ScaleLoRA    W' = W ∘ (B A)               A and B are 1/√r everywhere at the start, so that B A is all ones

W is frozen. Training multiplies with the very W' that is merged in the end, so that nothing is cut off after it. Biases, and gains and
biases of norms, are trained as well. Zeros of W stay as they are to the bit, hence every pattern of them.

With equal columns of B, and equal rows of A, the r parts of ScaleLoRA get equal gradients and stay equal: as in the paper's program
it scales by a matrix of rank one, that is rows and columns.

The paper trains on a text; here the predictions are pulled by default towards those of the model that the pipeline began with, as in
`lora`. The head, to which the paper's program gives a plain adapter, is left alone: it often is the embedding.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import DENSE, HUGGINGFACE, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.settings import Adapters
from slimbench.methods.core.training import TrainingSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from slimbench.methods.core.low_rank import Factors
    from slimbench.methods.core.training import Trained


@dataclass(frozen=True)
class SparseLoRA(TrainingSettings, Method):
    """Adapters on all linear layers of the blocks, made for pruned weights, beside trained biases and norms; merged."""

    accepts = DENSE
    needs = Needs(calibration=True, training=True)

    learning_rate: float = 5e-4
    schedule: Literal["cosine", "linear", "constant"] = "linear"

    @abstractmethod
    def start(self, layer: nn.Linear, generator: torch.Generator) -> Factors:
        """The factors [rank, in] and [out, rank] that training begins with."""

    @abstractmethod
    def changed(self, weight: Tensor, reduce: Tensor, expand: Tensor) -> Tensor:
        """The weight [out, in] with its adapter, as it is where it is not zero."""

    def merged(self, weight: Tensor, reduce: Tensor, expand: Tensor) -> Tensor:
        """W' [out, in], float32."""
        import torch

        return torch.where(weight == 0, weight, self.changed(weight, reduce, expand))

    def product(self, layer: nn.Linear, x: Tensor, reduce: Tensor, expand: Tensor) -> Tensor:
        """What a layer gives for inputs [..., in] while its adapter is trained."""
        import torch

        with torch.autocast(x.device.type, enabled=False):
            weight = self.merged(layer.weight, reduce, expand)
        return torch.nn.functional.linear(x, weight, layer.bias)

    def train(
        self, model: PreTrainedModel, layers: dict[str, nn.Linear], ids: Tensor, dense: DenseModel
    ) -> tuple[dict[str, tuple[nn.Parameter, nn.Parameter]], Trained]:
        """Train adapters, and biases and norms in place; the factors by layer, and what the training was."""
        import torch

        from slimbench.methods.core.learning import adapters, trained
        from slimbench.methods.peft import finetune

        generator = torch.Generator().manual_seed(self.seed + dense.seed)
        factors = adapters.learned({name: self.start(layer, generator) for name, layer in layers.items()})
        with adapters.computing(layers, lambda name, layer, x: self.product(layer, x, *factors[name])):
            done = trained.fit(self, model, adapters.named(factors) | finetune.vectors(model), ids, dense)
        return factors, done

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.core.layers import block_linears
        from slimbench.methods.core.learning import trained

        model = trained.load(dense)
        layers = block_linears(model)
        factors, done = self.train(model, layers, calibration.ids, dense)
        with torch.no_grad():
            for name, (reduce, expand) in factors.items():
                layers[name].weight.copy_(self.merged(layers[name].weight, reduce, expand))
        trained.save(model, dense, out)
        rank = max(len(reduce) for reduce, _ in factors.values())
        return done.added_to(Claim(HUGGINGFACE, teacher=trained.teacher(self), details={"rank": rank}))


@dataclass(frozen=True)
class MaskLoRA(Adapters, SparseLoRA):
    """The adapter is added where the weight is not zero."""

    name = "mask-lora"
    citation = Citation("MaskLoRA", year=2023, arxiv="2312.15230", covers=("pruning/perp-prune-and-tune-fast-optimal-update",))

    alpha: float = 32.0

    def start(self, layer: nn.Linear, generator: torch.Generator) -> Factors:
        from slimbench.methods.core.learning import adapters

        return adapters.adapter(layer, self.rank, generator)

    def changed(self, weight: Tensor, reduce: Tensor, expand: Tensor) -> Tensor:
        return weight + self.alpha / self.rank * (expand @ reduce)


@dataclass(frozen=True)
class ScaleLoRA(SparseLoRA):
    """The weight is multiplied with the adapter, element by element.

    Attributes:
        rank: Of the adapters.
    """

    name = "scale-lora"
    citation = Citation("ScaleLoRA", year=2023, arxiv="2312.15230")

    rank: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")

    def start(self, layer: nn.Linear, generator: torch.Generator) -> Factors:
        even = self.rank**-0.5
        return layer.weight.new_full((self.rank, layer.in_features), even), layer.weight.new_full((layer.out_features, self.rank), even)

    def changed(self, weight: Tensor, reduce: Tensor, expand: Tensor) -> Tensor:
        return weight * (expand @ reduce)
