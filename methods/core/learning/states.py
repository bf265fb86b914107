"""Queries, keys and values of attentions while a model computes, through the function that transformers lets anyone register.

One function serves all architectures whose attentions go through that interface, so that nothing here knows one of them. The attention
itself is torch's fused one, as before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slimbench.util.compat.transformers import attention_implementation

NAME = "slimbench_states"


@dataclass
class States:
    """What attentions computed with in the last pass, by their indices (`attentions`).

    Attributes:
        layers: Indices of those that are recorded.
        queries: [B, heads, length, head dimension], rotated; where a model scales scores otherwise than by 1 / √(head dimension), these
            are scaled so that it does.
        keys: [B, key-value heads, length, head dimension], rotated.
        values: [B, key-value heads, length, head dimension].
    """

    layers: Collection[int]
    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def scores(self, layer: int) -> Tensor:
        """Scaled products of queries and keys, before mask and softmax, [B, heads, length, length], in float32."""
        query, key = self.queries[layer].float(), self.keys[layer].float()
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        return query @ key.transpose(2, 3) / query.shape[3] ** 0.5


_recorded: dict[int, States] = {}


def attentions(model: Any) -> list[int | None]:
    """The index under which the attention of each block is recorded; None of a block that has lost it."""
    from slimbench.methods.formats.architecture.structure import blocks_of

    found: list[int | None] = []
    for block in blocks_of(model).values():
        places: list[Any] = [part.layer_idx for part in block.modules() if hasattr(part, "layer_idx") and hasattr(part, "head_dim")]
        found.append(places[0] if places else None)
    return found


@contextmanager
def attention_states(model: Any, layers: Collection[int]) -> Iterator[States]:
    """Record what some attentions of a model compute with, in each pass anew."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before, states = attention_implementation(model), States(layers)
    model.set_attn_implementation(NAME)
    _recorded[id(model.config)] = states
    try:
        yield states
    finally:
        del _recorded[id(model.config)]
        model.set_attn_implementation(before)


@torch.no_grad()
def unrotated(model: Any, ids: Tensor) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Queries [B, H, T, D], keys and values [B, G, T, D] of a text by layer, before queries and keys are rotated."""
    from slimbench.methods.formats.attention.operators.interface import attentions
    from slimbench.methods.formats.depth.rows import states

    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        found[module.layer_idx] = states(module, "q", hidden), states(module, "k", hidden), states(module, "v", hidden)

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in attentions(model)]
    try:
        model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **more: Any
) -> tuple[Tensor, None]:
    """What transformers calls."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    states, layer = _recorded[id(module.config)], module.layer_idx
    if layer in states.layers:
        states.queries[layer] = query if scaling is None else query * (scaling * query.shape[3] ** 0.5)
        states.keys[layer], states.values[layer] = key, value
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)


def visible(scores: Tensor) -> Tensor:
    """Which of two positions [length, length] sees the other in a decoder: the earlier ones and itself."""
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
