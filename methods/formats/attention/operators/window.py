"""The attention of `methods.formats.attention.window`."""

from __future__ import annotations

import torch
from torch import Tensor

from slimbench.methods.formats.attention.operators.interface import Kept, Operator, Rotary, attention, earlier_and_itself, joined, repeated

_QUERIES = 256
"""Tokens whose scores are held at once."""


class WindowOperator(Operator):
    """Keeps `sinks`, keys that are not rotated, `keys`, rotated ones of later tokens, and `values` of all of them."""

    def __init__(self, rotary: Rotary, scaling: float, sinks: int, recent: int) -> None:
        super().__init__(rotary, scaling)
        self.sinks, self.recent = sinks, recent

    def forward(self, query: Tensor, key: Tensor, value: Tensor, kept: Kept | None) -> Tensor:
        first, tokens = self.first(query, kept), query.shape[2]
        end, held = first + tokens, kept.tensors_by_name if kept else {}
        count = max(0, min(tokens, self.sinks - first))
        sinks = joined(held.get("sinks"), key[:, :, :count])
        keys = joined(held.get("keys"), self.rotary(key[:, :, count:], first + count))
        values = joined(held.get("values"), value)
        if kept:
            gone = max(0, keys.shape[2] - self.recent)
            at = sinks.shape[2]
            later = values if not gone else torch.cat([values[:, :, :at], values[:, :, at + gone :]], 2)
            kept.keep({"sinks": sinks, "keys": keys[:, :, gone:], "values": later})
        limit = self.sinks + self.recent
        if end <= limit + 1:  # nothing was dropped that one of these tokens would see
            everything = torch.cat([self.rotary(sinks, 0), keys], 2)
            seen = earlier_and_itself(first, tokens, end, query.device)
            return attention(self.rotary(query, first), everything, values, self.scaling, seen)
        if tokens == 1:
            nearer = torch.cat([self.rotary(sinks, first - limit), keys], 2)
            return attention(self.rotary(query, first), nearer, values, self.scaling)
        return self._many(query, self.rotary(sinks, 0), keys, values, first)

    def _many(self, query: Tensor, sinks: Tensor, keys: Tensor, values: Tensor, first: int) -> Tensor:
        """Tokens of which each has its own distance to the sinks; some at a time, over the keys that one of them sees."""
        heads, count, device = query.shape[1], sinks.shape[2], query.device
        sinks, keys, values = (repeated(part, heads) for part in (sinks, keys, values))
        oldest = first + query.shape[2] - keys.shape[2]
        places = torch.arange(oldest, oldest + keys.shape[2], device=device)
        found = []
        for begin in range(0, query.shape[2], _QUERIES):
            part = query[:, :, begin : begin + _QUERIES]
            at = torch.arange(first + begin, first + begin + part.shape[2], device=device)
            low, high = (max(0, at - oldest) for at in (first + begin - self.recent, first + begin + part.shape[2]))
            distance = at[:, None] - places[None, low:high]
            to_keys = self.rotary.at(part, at) @ keys[:, :, low:high].transpose(2, 3)
            to_keys = to_keys.masked_fill((distance < 0) | (distance > self.recent), -torch.inf)
            to_sinks = self.rotary.at(part, at.clamp(max=self.sinks + self.recent)) @ sinks.transpose(2, 3)
            to_sinks = to_sinks.masked_fill(torch.arange(count, device=device)[None] > at[:, None], -torch.inf)
            weights = torch.softmax(torch.cat([to_sinks, to_keys], -1).float() * self.scaling, -1).to(values.dtype)
            found.append(weights @ torch.cat([values[:, :, :count], values[:, :, count + low : count + high]], 2))
        return torch.cat(found, 2)
