"""What the methods of this room share: the model in float32, layers that compute something else while they learn, the artefact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimbench.methods.base import DenseModel, Unsupported
from slimbench.methods.core.learning.hooks import Hooks
from slimbench.methods.core.low_rank import Factors
from slimbench.methods.core.training import Trained, TrainingSettings, cut, objective, train
from slimbench.methods.formats.huggingface import save_dense

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SPARSE = 0.01  # share of zeros from which on a layer was pruned


def load(dense: DenseModel) -> PreTrainedModel:
    """The model as it is trained: parameters in float32, without gradients as yet."""
    return dense.load(dtype=torch.float32).requires_grad_(False)


def fit(
    settings: TrainingSettings,
    model: PreTrainedModel,
    parameters: Mapping[str, nn.Parameter],
    ids: Tensor,
    dense: DenseModel,
    hooks: Hooks | None = None,
) -> Trained:
    """Train some parameters of a model, or of what its layers compute, on tokens [samples, length] by the loss that the settings name."""
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return train(settings, parameters, objective(settings, model, dense), cut(ids, settings.length), dense, hooks)


def save(model: PreTrainedModel, dense: DenseModel, out: Path) -> None:
    """Write the model in the dtype that it had."""
    dtype = getattr(torch, dense.dtype)
    model.to(dtype)
    model.config.dtype = dtype
    save_dense(model, out)


def teacher(settings: TrainingSettings) -> str | None:
    """Whose outputs were learned, in the words of a claim."""
    return "the model that the pipeline began with" if settings.loss == "distillation" else None


def vectors(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Biases of layers and norms, and gains of norms, by name: whatever has one dimension."""
    return {name: value for name, value in model.named_parameters() if value.dim() == 1}


def adapter(layer: nn.Linear, rank: int, generator: torch.Generator) -> Factors:
    """Factors [rank, in] and [out, rank] as LoRA begins with: the first even within ±1/√in, the second zero.

    Args:
        generator: On the CPU.
    """
    bound = layer.in_features**-0.5
    first = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
    return first.to(layer.weight.device), torch.zeros(layer.out_features, rank, device=layer.weight.device)


def learned(factors: Mapping[str, Factors]) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Factors by layer as parameters."""
    return {name: (nn.Parameter(first), nn.Parameter(second)) for name, (first, second) in factors.items()}


def named(factors: Mapping[str, tuple[nn.Parameter, nn.Parameter]]) -> dict[str, nn.Parameter]:
    """The parameters of factors by name."""
    return {f"{name}.{part}": value for name, pair in factors.items() for part, value in zip(("reduce", "expand"), pair, strict=True)}


@contextmanager
def computing(layers: Mapping[str, Any], product: Callable[[str, Any, Tensor], Tensor]) -> Iterator[None]:
    """Let linear layers compute something else for a while: of a layer's name, the layer and inputs [..., in] the outputs [..., out]."""
    for name, layer in layers.items():
        layer.forward = partial(product, name, layer)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


def check_zeros(layers: Mapping[str, nn.Linear]) -> None:
    """Raise `Unsupported` if a layer was pruned: what is added to its whole weight would fill the zeros."""
    for name, layer in layers.items():
        if (zeros := float((layer.weight == 0).float().mean())) > _SPARSE:
            raise Unsupported(f"{name} has {zeros:.0%} zeros, which merged adapters would fill")
