"""LoRA: a product of two thin matrices is trained beside each weight, and added to it in the end.

    W' = W + α/r · B A        A [r, in] random, B [out, r] zero at the start; W is frozen, A and B are trained

The paper adapts a model to a task. Here it recovers what an earlier step of a pipeline cut: by default the predictions are pulled towards
those of the model that the pipeline began with. The merged model has the layers, and the speed, that it had before.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slimbench.methods.base import DENSE, HUGGINGFACE, Calibration, Citation, Claim, DenseModel, Method, Needs, Unsupported
from slimbench.methods.core.settings import Adapters
from slimbench.methods.core.training import TrainingSettings
from slimbench.methods.formats.huggingface import save_dense

if TYPE_CHECKING:
    from torch import nn

_SPARSE = 0.01  # share of zeros from which on a layer was pruned


@dataclass(frozen=True)
class LoRA(Adapters, TrainingSettings, Method):
    """Adapters on all linear layers of the blocks, merged; a pruned weight is refused, since its zeros would be filled."""

    name: ClassVar[str] = "lora"
    accepts: ClassVar[tuple[str, ...]] = DENSE
    family: ClassVar[str] = "peft"
    citation: ClassVar[Citation] = Citation("LoRA", year=2021, arxiv="2106.09685", covers=("peft/lora",))
    reference: ClassVar[str] = "peft:LoraConfig"
    needs: ClassVar[Needs] = Needs(calibration=True, training=True, extra="peft", modules=("peft",))

    rank: int = 8

    def compress(self, dense: DenseModel, calibration: Calibration | None, out: Path) -> Claim:
        import torch

        from slimbench.methods.core.layers import block_linears
        from slimbench.methods.core.low_rank import train_adapters

        assert calibration is not None
        model = dense.load(dtype=torch.float32).requires_grad_(False)
        layers = block_linears(model)
        _check_zeros(layers)
        made, done = train_adapters(model, self, self.rank, self.alpha, calibration.ids, dense)
        for name, (reduce, expand) in made.items():
            layers[name].weight += expand @ reduce
        dtype = getattr(torch, dense.dtype)
        model.to(dtype)
        model.config.dtype = dtype
        save_dense(model, out)
        teacher = "the model that the pipeline began with" if self.loss == "distillation" else None
        return done.added_to(Claim(HUGGINGFACE, teacher=teacher, details={"rank": self.rank}))


def _check_zeros(layers: dict[str, nn.Linear]) -> None:
    for name, layer in layers.items():
        if (zeros := float((layer.weight == 0).float().mean())) > _SPARSE:
            raise Unsupported(f"{name} has {zeros:.0%} zeros, which merged adapters would fill")
