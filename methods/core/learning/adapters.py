"""Thin matrices that learn beside the linear layers of a model, and layers that compute something else for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimbench.methods.core.low_rank import Factors


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
