"""Queries, keys and values of a layer, rotations written out, and a run of an operator over a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from slimbench.methods.formats.attention.operators.interface import Kept, Operator, Rotary

States = tuple[Tensor, Tensor, Tensor]


def rotary(width: int) -> Rotary:
    """The rotations of a Llama whose heads have this width."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return Rotary(LlamaRotaryEmbedding(LlamaConfig(hidden_size=width, num_attention_heads=1, head_dim=width)))


def turned(vector: Tensor, position: int) -> Tensor:
    """R(position) x in float64: each pair (x_i, x_{i + D/2}) turned by position · 10000^(-2i / D)."""
    half = len(vector) // 2
    angles = position * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    low, high = vector[:half].double(), vector[half:].double()
    return torch.cat([low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()])


def draw(batch: int, heads: int, groups: int, tokens: int, width: int, seed: int = 0) -> States:
    """Queries [B, H, T, D], keys and values [B, G, T, D], not rotated."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(batch, count, tokens, width) for count in (heads, groups, groups)]
    query, key, value = (torch.randn(size, generator=generator) * 1.5 for size in sizes)
    return query, key, value


def run(operator: Operator, states: States, sizes: Sequence[int], kept: Any = None) -> Tensor:
    """The result for a text that comes in pieces."""
    kept = kept or Kept()
    parts = []
    for query, key, value in zip(*(part.split(list(sizes), 2) for part in states), strict=True):
        kept.update(key, value)
        parts.append(operator(query, key, value, kept))
    return torch.cat(parts, 2)


@contextmanager
def given() -> Iterator[list[int]]:
    """Numbers of keys that torch's attention is called with, those behind a mask included."""
    found: list[int] = []
    real = functional.scaled_dot_product_attention

    def watched(query: Any, key: Any, value: Any, **more: Any) -> Any:
        found.append(key.shape[2])
        return real(query, key, value, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", watched)
        yield found
