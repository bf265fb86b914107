"""The attention of `methods.formats.attention.pages`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from slimbench.methods.formats.attention.operators.eviction import reading
from slimbench.methods.formats.attention.operators.interface import (
    Kept,
    Operator,
    Rotary,
    attention,
    earlier_and_itself,
    joined,
    of_each_head,
    repeated,
)


class PagesOperator(Operator):
    """Keeps `keys` and `values`, and `low` and `high` [B, G, pages, D] of whole pages."""

    decides_after = True

    def __init__(self, rotary: Rotary, scaling: float, pages: int, page: int) -> None:
        super().__init__(rotary, scaling)
        self.pages, self.page = pages, page

    def forward(self, query: Tensor, key: Tensor, value: Tensor, kept: Kept | None) -> Tensor:
        first, tokens = self.first(query, kept), query.shape[2]
        held = kept.tensors_by_name if kept else {}
        keys, values = joined(held.get("keys"), self.rotary(key, first)), joined(held.get("values"), value)
        low, high = self._bounds(held, keys)
        query = self.rotary(query, first)
        if kept:
            kept.keep({"keys": keys, "values": values, "low": low, "high": high})
            if kept.reading is not None and not first:
                kept.reading = reading(query, keys, values, self.scaling)
        if not first or -(-keys.shape[2] // self.page) <= self.pages:
            return attention(query, keys, values, self.scaling, earlier_and_itself(first, tokens, keys.shape[2], query.device))
        parts = [self._one(query[:, :, i : i + 1], keys[:, :, : first + i + 1], values, low, high) for i in range(tokens)]
        return torch.cat(parts, 2)

    def decide(self, reading: dict[str, Tensor], kept: Kept) -> None:
        """See `Operator`."""
        low, high = self._bounds({}, reading["keys"])
        kept.keep({"keys": reading["keys"], "values": reading["values"], "low": low, "high": high})

    def _bounds(self, held: dict[str, Tensor], keys: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest keys of all whole pages; those that were whole before are taken as they were."""
        before = held["low"].shape[2] if held else 0
        whole = keys[:, :, before * self.page : keys.shape[2] // self.page * self.page].unflatten(2, (-1, self.page))
        low, high = whole.amin(3), whole.amax(3)
        return (torch.cat([held["low"], low], 2), torch.cat([held["high"], high], 2)) if held else (low, high)

    def _one(self, query: Tensor, keys: Tensor, values: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Attention of one token over the pages that it chooses."""
        count, heads = keys.shape[2], query.shape[1]
        whole, rest = divmod(count, self.page)
        low, high = low[:, :, :whole], high[:, :, :whole]
        if rest:
            newest = keys[:, :, whole * self.page :]
            low, high = torch.cat([low, newest.amin(2, True)], 2), torch.cat([high, newest.amax(2, True)], 2)
        bound = torch.maximum(query * repeated(low, heads), query * repeated(high, heads)).float().sum(-1)
        chosen = bound.topk(min(self.pages, bound.shape[-1])).indices.sort(-1).values
        places = (chosen[..., None] * self.page + torch.arange(self.page, device=chosen.device)).flatten(2)
        inside = places < count
        keys, values = (of_each_head(part[:, :, :count], places.clamp(max=count - 1)) for part in (keys, values))
        return functional.scaled_dot_product_attention(query, keys, values, attn_mask=inside[:, :, None], scale=self.scaling)
