"""What the methods of this room share: the model in float32, layers that compute something else while they learn, the artefact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimbench.methods.base import Unsupported
from slimbench.methods.core.learning.trained import fit as fit
from slimbench.methods.core.learning.trained import load as load
from slimbench.methods.core.learning.trained import save as save
from slimbench.methods.core.learning.trained import teacher as teacher
from slimbench.methods.core.low_rank import Factors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SPARSE = 0.01  # share of zeros from which on a layer was pruned


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
