"""Matrices of a low rank, as products of two thin ones: the closest to a matrix, and adapters that are trained beside a frozen weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slimbench.methods.base import DenseModel
from slimbench.methods.core.layers import block_linears
from slimbench.methods.core.training import Trained, TrainingSettings, cut, objective, train
from slimbench.methods.kernels.grid import LowRank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Factors = tuple[Tensor, Tensor]
"""[rank, in] and [out, rank]: the matrix is their product, the second times the first."""


def closest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors √σ vᵀ [rank, in] and u √σ [out, rank] of the largest singular values of a matrix [out, in], in its dtype.

    No product of that rank is closer to the matrix in the Frobenius norm (Eckart and Young). A rank above the smaller side is that
    side. The factors come from the eigenvectors of the smaller Gram matrix, in float64: many times faster than a whole decomposition.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.double().t() if tall else matrix.double()
    vectors = torch.linalg.eigh(wide @ wide.t()).eigenvectors[:, -rank:].flip(-1)
    others = vectors.t() @ wide
    roots = others.norm(dim=1, keepdim=True).sqrt()
    left, right = vectors * roots.t(), others / roots.clamp_min(torch.finfo(torch.float64).tiny)
    first, second = (left.t(), right.t()) if tall else (right, left)
    return first.to(matrix.dtype).contiguous(), second.to(matrix.dtype).contiguous()


def train_adapters(
    model: PreTrainedModel,
    settings: TrainingSettings,
    rank: int,
    alpha: float,
    ids: Tensor,
    dense: DenseModel,
    initial: Mapping[str, Factors] | None = None,
) -> tuple[dict[str, Factors], Trained]:
    """Train an adapter for each linear layer of the blocks; the model is left as it was.

    Args:
        model: float32, frozen.
        alpha: peft scales the product of an adapter by alpha / rank.
        ids: Tokens [samples, length].
        initial: By layer the factors to start from, the scaling in their product; peft's own if None.

    Returns:
        float32 factors by layer, the scaling in the second one, and what the training was.
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
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    done = train(settings, parameters, objective(settings, adapted, dense), cut(ids, settings.length), dense)
    made = {name: (parameters[f"{name}.lora_A"].detach(), scaling * parameters[f"{name}.lora_B"].detach()) for name in names}
    adapted.unload()
    return made, done


def stored(made: Mapping[str, Factors], dtype: torch.dtype) -> dict[str, LowRank]:
    """Factors by layer as they lie beside a quantized weight, rounded to a dtype."""
    return {name: LowRank(*(part.to(dtype).contiguous() for part in factors)) for name, factors in made.items()}
