"""What the methods of this room share: one-dimensional parameters, and the refusal of zeros that would be filled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from slimbench.methods.base import Unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SPARSE = 0.01  # share of zeros from which on a layer was pruned


def vectors(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Biases of layers and norms, and gains of norms, by name: whatever has one dimension."""
    return {name: value for name, value in model.named_parameters() if value.dim() == 1}


def check_zeros(layers: Mapping[str, nn.Linear]) -> None:
    """Raise `Unsupported` if a layer was pruned: what is added to its whole weight would fill the zeros."""
    for name, layer in layers.items():
        if (zeros := float((layer.weight == 0).float().mean())) > _SPARSE:
            raise Unsupported(f"{name} has {zeros:.0%} zeros, which merged adapters would fill")
