"""QLoRA: low-rank adapters in 16 bits, trained over a frozen NF4 base with quantized scales.

The base is what bitsandbytes stores. Training multiplies with its weights dequantized once, since they never change; the artefact is
the 4-bit base with the adapters beside it. Nothing is merged: a merged weight would have to be rounded again, and that is another method.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.settings import Adapters
from slimbench.methods.core.training import TrainingSettings
from slimbench.methods.formats import huggingface
from slimbench.methods.quantization.weight.bitsandbytes import NF4

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class QLoRA(Adapters, TrainingSettings, Method):
    """Adapters on all linear layers of the blocks; embeddings, norms and head are left alone.

    Attributes:
        double_quant: Quantize the scales of the base as well.
        rank: Of the adapters; 64 in the paper, beside layers many times as wide.
    """

    name = "qlora"
    citation = Citation("QLoRA", year=2023, arxiv="2305.14314", covers=("quantization/parameter-efficient-qlora", "peft/qlora-qa-lora"))
    reference = "peft:LoraConfig"
    needs = Needs(calibration=True, training=True, extra="quantization", modules=("bitsandbytes", "peft"))
    produces = "adapters"
    weight_grid = "codebook"

    double_quant: bool = True
    learning_rate: float = 2e-4

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.core.low_rank import stored, train_adapters
        from slimbench.methods.formats import adapters
        from slimbench.methods.quantization.solvers import qat as _qat

        base = NF4(double_quant=self.double_quant)
        claim = base.compress(dense, Calibration.none(), out)
        model = _qat.load_float32(dense)
        _take_weights(model, out, dense.device)
        factors, done = train_adapters(model, self, self.rank, self.alpha, calibration.ids, dense)
        made = stored(factors, getattr(torch, dense.dtype))
        adapters.save(out, made)
        details = claim.details | {"rank": self.rank, "stored_bits": adapters.stored_bits(out, made)}
        return done.added_to(replace(claim, format=self.produces, details=details))


def _take_weights(model: PreTrainedModel, folder: Path, device: str) -> None:
    """Give the linear layers of the blocks the numbers of an NF4 artefact, dequantized by bitsandbytes before any forward pass."""
    from bitsandbytes.functional import dequantize_4bit

    from slimbench.methods.core.layers import block_linears

    quantized = huggingface.load(folder, device)
    for name, layer in block_linears(model).items():
        weight = quantized.get_submodule(name).weight
        layer.weight.data.copy_(dequantize_4bit(weight.data, weight.quant_state))
