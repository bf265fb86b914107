"""The attention of `methods.formats.attention.patterns`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slimbench.methods.formats.attention.operators.interface import Kept, Operator, Rotary, attention, earlier_and_itself, joined


class PatternOperator(Operator):
    """Keeps `keys` and `values` of all tokens.

    Args:
        pattern: Whether tokens [T, 1] see others [1, K], by their positions and the head: bool [T, K].
        by_head: Heads differ in it.
    """

    def __init__(self, rotary: Rotary, scaling: float, pattern: Callable[[Tensor, Tensor, int], Tensor], by_head: bool) -> None:
        super().__init__(rotary, scaling)
        self.pattern, self.by_head = pattern, by_head

    def forward(self, query: Tensor, key: Tensor, value: Tensor, kept: Kept | None) -> Tensor:
        first, tokens = self.first(query, kept), query.shape[2]
        held = kept.tensors_by_name if kept else {}
        keys, values = joined(held.get("keys"), self.rotary(key, first)), joined(held.get("values"), value)
        if kept:
            kept.keep({"keys": keys, "values": values})
        query, count = self.rotary(query, first), keys.shape[2]
        at = torch.arange(first, first + tokens, device=query.device)[:, None]
        places = torch.arange(count, device=query.device)[None]
        heads = range(query.shape[1] if self.by_head else 1)
        seen = torch.stack([self.pattern(at, places, head) for head in heads]) & (places <= at)
        if bool((seen == (places <= at)).all()):
            return attention(query, keys, values, self.scaling, earlier_and_itself(first, tokens, count, query.device))
        if tokens == 1 and len(heads) == 1:
            wanted = seen[0, 0].nonzero()[:, 0]
            return attention(query, keys.index_select(2, wanted), values.index_select(2, wanted), self.scaling)
        return attention(query, keys, values, self.scaling, seen[None])
