"""Attention of one new token over a KV cache, in plain operations that a compiler fuses.

torch's own fused attention is made for many queries: compiled for a CPU, these loops take between a third and a twentieth of its time for
one of them (batches 1 to 16, caches of 160 to 4096 tokens). Prompts that come here go to the library as before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimbench.util.compat.transformers import attention_implementation

NAME = "slimbench_decode"


def use(module: Any) -> None:
    """Let a transformers model that attends through torch's fused operator attend through this module."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if attention_implementation(module) == "sdpa":
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        module.set_attn_implementation(NAME)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Softmax-weighted values, in float32 inside.

    Args:
        query: [B, H, 1, D], the dtype of the result.
        key: [B, G, T, D]; each of the G heads serves H / G consecutive queries.
        value: [B, G, T, D].
        mask: [B, 1 or H, 1, T], bool (True: seen) or added to the scores; None: everything is seen.
        scaling: Factor of the scores.

    Returns:
        [B, 1, H, D].
    """
    batch, heads, _, width = query.shape
    groups = key.shape[1]
    grouped = (query.float() * scaling).view(batch, groups, heads // groups, 1, width)
    scores = (grouped * key.float().unsqueeze(2)).sum(-1)
    if mask is not None:
        seen = mask.view(batch, -1, 1, mask.shape[3]) if mask.shape[1] == 1 else mask.view(scores.shape)
        scores = scores.masked_fill(~seen, -torch.inf) if mask.dtype is torch.bool else scores + seen
    weights = torch.softmax(scores, -1)
    found = (weights.unsqueeze(-1) * value.float().unsqueeze(2)).sum(-2)
    return found.to(query.dtype).view(batch, 1, heads, width)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **more: Any
) -> tuple[Tensor, None]:
    """What transformers calls."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    return attend(query, key, value, attention_mask, query.shape[3] ** -0.5 if scaling is None else scaling), None
