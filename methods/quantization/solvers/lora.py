"""Low-rank adapters beside a frozen, quantized base, trained with peft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimbench.methods.base import DenseModel
from slimbench.methods.core.layers import block_linears
from slimbench.methods.core.training import Trained, TrainingSettings
from slimbench.methods.kernels.grid import LowRank
from slimbench.methods.quantization.solvers import qat as _qat

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fit(
    model: PreTrainedModel,
    settings: TrainingSettings,
    rank: int,
    alpha: float,
    ids: Tensor,
    dense: DenseModel,
    initial: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> tuple[dict[str, LowRank], Trained]:
    """Train an adapter for each linear layer of the blocks; the model is left as it was.

    Args:
        model: float32, with the dequantized weights of the base.
        alpha: peft scales the product of an adapter by alpha / rank.
        initial: By layer the factors [rank, in] and [out, rank] to start from, the scaling in their product; peft's own if None.
    """
    from peft import LoraConfig, get_peft_model

    names = list(block_linears(model))
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM")  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed + dense.seed)
        adapted: Any = get_peft_model(model, config)
    layers = {name: adapted.base_model.model.get_submodule(name) for name in names}
    scaling = alpha / rank
    with torch.no_grad():
        for name, (first, second) in (initial or {}).items():
            layers[name].lora_A["default"].weight.copy_(first)
            layers[name].lora_B["default"].weight.copy_(second / scaling)
    parameters = {
        f"{name}.{part}": getattr(layer, part)["default"].weight for name, layer in layers.items() for part in ("lora_A", "lora_B")
    }
    done = _qat.fit(adapted, parameters, settings, ids, dense)
    dtype = getattr(torch, dense.dtype)
    made = {
        name: LowRank(
            parameters[f"{name}.lora_A"].detach().to(dtype).contiguous(),
            (scaling * parameters[f"{name}.lora_B"].detach()).to(dtype).contiguous(),
        )
        for name in names
    }
    adapted.unload()
    return made, done
