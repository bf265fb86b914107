"""LoRA: a product of two thin matrices is trained beside each weight, and added to it in the end.

    W' = W + α/r · B A        A [r, in] random, B [out, r] zero at the start; W is frozen, A and B are trained

The paper adapts a model to a task. Here it recovers what an earlier step of a pipeline cut: by default the predictions are pulled towards
those of the model that the pipeline began with. The merged model has the layers, and the speed, that it had before. Below a policy it
learns with that in force: behind linear attention this is LoLCATs' second step (arXiv 2410.10254), which takes the text itself for its
loss (`loss=nll`) and adapts the projections of attentions alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from slimbench.methods.base import DENSE, HUGGINGFACE, POLICY, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.settings import Adapters
from slimbench.methods.core.training import TrainingSettings


@dataclass(frozen=True)
class LoRA(Adapters, TrainingSettings, Method):
    """Adapters on all linear layers of the blocks, merged; a pruned weight is refused, since its zeros would be filled."""

    name: ClassVar[str] = "lora"
    accepts: ClassVar[tuple[str, ...]] = (*DENSE, POLICY)
    family: ClassVar[str] = "peft"
    citation: ClassVar[Citation] = Citation("LoRA", year=2021, arxiv="2106.09685", covers=("peft/lora",))
    reference: ClassVar[str] = "peft:LoraConfig"
    needs: ClassVar[Needs] = Needs(calibration=True, training=True, extra="peft", modules=("peft",))

    rank: int = 8

    def compress(self, dense: DenseModel, calibration: Calibration | None, out: Path) -> Claim:
        from slimbench.methods.core.layers import block_linears
        from slimbench.methods.core.learning import trained
        from slimbench.methods.core.low_rank import train_adapters
        from slimbench.methods.peft import finetune

        assert calibration is not None
        model = trained.load(dense)
        layers = block_linears(model)
        finetune.check_zeros(layers)
        made, done = train_adapters(model, self, self.rank, self.alpha, calibration.ids, dense)
        for name, (reduce, expand) in made.items():
            layers[name].weight += expand @ reduce
        trained.save(model, dense, out)
        return done.added_to(Claim(HUGGINGFACE, teacher=trained.teacher(self), details={"rank": self.rank}))
