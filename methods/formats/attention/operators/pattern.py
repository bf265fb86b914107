"""The attention of `methods.formats.attention.patterns`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

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

_QUERIES = 256
"""Tokens of which it is held at once what they see."""


class Pattern(Protocol):
    """What the operator asks of `methods.formats.attention.patterns.Pattern`."""

    def seen(self, at: Tensor, keys: Tensor, layer: int, heads: int) -> Tensor: ...

    def counts(self, at: Tensor) -> Tensor: ...


class PatternOperator(Operator):
    """Keeps `keys` and `values` of all tokens.

    Args:
        pattern: What tokens see, by their positions.
        layer: That of the attention.
    """

    def __init__(self, rotary: Rotary, scaling: float, pattern: Pattern, layer: int) -> None:
        super().__init__(rotary, scaling)
        self.pattern, self.layer = pattern, layer

    def forward(self, query: Tensor, key: Tensor, value: Tensor, kept: Kept | None) -> Tensor:
        first, tokens = self.first(query, kept), query.shape[2]
        held = kept.tensors_by_name if kept else {}
        keys, values = joined(held.get("keys"), self.rotary(key, first)), joined(held.get("values"), value)
        if kept:
            kept.keep({"keys": keys, "values": values})
        query, count = self.rotary(query, first), keys.shape[2]
        at = torch.arange(first, count)
        if bool((self.pattern.counts(at) == at + 1).all()):
            return attention(query, keys, values, self.scaling, earlier_and_itself(first, tokens, count, query.device))
        at, places = at.to(query.device)[:, None], torch.arange(count, device=query.device)[None]
        if tokens == 1:
            return self._one(query, keys, values, self._seen(at, places, query.shape[1])[:, 0])
        keys, values = (repeated(part, query.shape[1]) for part in (keys, values))
        found = []
        for begin in range(0, tokens, _QUERIES):
            span, until = slice(begin, begin + _QUERIES), min(count, first + begin + _QUERIES)
            seen = self._seen(at[span], places[:, :until], query.shape[1])
            found.append(attention(query[:, :, span], keys[:, :, :until], values[:, :, :until], self.scaling, seen[None]))
        return torch.cat(found, 2)

    def _seen(self, at: Tensor, places: Tensor, heads: int) -> Tensor:
        """Whether tokens see others, bool [heads or 1, T, K], no later ones."""
        return self.pattern.seen(at, places, self.layer, heads) & (places <= at)

    def _one(self, query: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        """One token, the last: each head reads what it sees, and as many more as the widest needs, masked.

        Args:
            seen: Bool [heads or 1, K].
        """
        if len(seen) == 1:
            wanted = seen[0].nonzero()[:, 0]
            return attention(query, keys.index_select(2, wanted), values.index_select(2, wanted), self.scaling)
        widest = int(seen.sum(-1).max())
        chosen = (~seen).to(torch.uint8).argsort(dim=-1, stable=True)[:, :widest]
        every = chosen[None].expand(len(query), -1, -1)
        keys, values = (of_each_head(part, every) for part in (keys, values))
        return attention(query, keys, values, self.scaling, seen.gather(-1, chosen)[None, :, None])
