"""The attention of `methods.formats.attention.hyper`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from slimbench.methods.formats.attention.operators.interface import Kept, Operator, Rotary, attention, earlier_and_itself, joined, repeated

_QUERIES = 256
"""Tokens whose scores are held at once where attention is exact."""

Part = tuple[Tensor, Tensor]
"""Results [B, H, T, D] over some keys, and the logarithms of the sums of weights [B, H, T, 1]."""


class HyperOperator(Operator):
    """Keeps `keys` and `values` of all tokens.

    Args:
        sizes: Keys of a block, and samples.
        projections: Bits of a hash.
        shortest: Tokens of a half from which on it is estimated how it sees the other.
        seed: And the layer.
    """

    def __init__(
        self, rotary: Rotary, scaling: float, sizes: tuple[int, int], projections: int, shortest: int, seed: tuple[int, int]
    ) -> None:
        super().__init__(rotary, scaling)
        self.block, self.samples = sizes
        self.projections, self.shortest, self.seed = projections, shortest, seed

    def forward(self, query: Tensor, key: Tensor, value: Tensor, kept: Kept | None) -> Tensor:
        first, tokens = self.first(query, kept), query.shape[2]
        held = kept.tensors_by_name if kept else {}
        keys, values = joined(held.get("keys"), self.rotary(key, first)), joined(held.get("values"), value)
        if kept:
            kept.keep({"keys": keys, "values": values})
        query = self.rotary(query, first)
        if first or tokens < 2 * self.shortest:
            return attention(query, keys, values, self.scaling, earlier_and_itself(first, tokens, keys.shape[2], query.device))
        keys, values = (repeated(part, query.shape[1]).float() for part in (keys, values))
        return self._prompt(query.float(), keys, values, 0)[0].to(value.dtype)

    def _prompt(self, query: Tensor, keys: Tensor, values: Tensor, first: int) -> Part:
        """Tokens that see themselves and earlier ones among them.

        Args:
            query: [B, H, T, D].
            keys: The same.
            values: The same.
            first: Position of the first of them.
        """
        tokens = query.shape[2]
        if tokens < 2 * self.shortest:
            return self._exact(query, keys, values)
        middle = (tokens + 1) // 2
        (early, late), (early_keys, late_keys), (early_values, late_values) = (
            part.split([middle, tokens - middle], 2) for part in (query, keys, values)
        )
        upper = self._prompt(early, early_keys, early_values, first)
        own = self._prompt(late, late_keys, late_values, first + middle)
        lower = merged(own, self._across(late, early_keys, early_values, first))
        return torch.cat([upper[0], lower[0]], 2), torch.cat([upper[1], lower[1]], 2)

    def _exact(self, query: Tensor, keys: Tensor, values: Tensor) -> Part:
        results, sums = [], []
        for begin in range(0, query.shape[2], _QUERIES):
            part = query[:, :, begin : begin + _QUERIES]
            until = begin + part.shape[2]
            scores = part @ keys[:, :, :until].transpose(2, 3) * self.scaling
            later = torch.ones(part.shape[2], until, dtype=torch.bool, device=query.device).triu(begin + 1)
            scores = scores.masked_fill(later, -torch.inf)
            results.append(scores.softmax(-1) @ values[:, :, :until])
            sums.append(scores.logsumexp(-1, keepdim=True))
        return torch.cat(results, 2), torch.cat(sums, 2)

    def _across(self, query: Tensor, keys: Tensor, values: Tensor, first: int) -> Part:
        """The estimate of how queries [B, H, Q, D] see all of some earlier keys [B, H, K, D], the first of which stands at `first`."""
        count, size = keys.shape[2], query.shape[2]
        blocks = -(-count // self.block)
        rows = -(-size // blocks)
        directions = self.directions(query.shape[-1], query.device)
        order, theirs = (ranks(part, directions).sort(dim=2, stable=True).indices for part in (query, keys))
        query, keys, values = _at(query, order), _at(keys, theirs), _at(values, theirs)
        cut = _cut(query, blocks, rows), _cut(keys, blocks, self.block), _cut(values, blocks, self.block)
        numbers = torch.arange(blocks, device=query.device)[:, None]
        filled = numbers * self.block + torch.arange(self.block, device=query.device) >= count
        scores = (cut[0] @ cut[1].transpose(3, 4) * self.scaling).masked_fill(filled[:, None], -torch.inf)
        drawn_values = values[:, :, :0]
        if self.samples and blocks > 1:
            drawn = self.drawn(first, count, query.shape[1], query.device)
            chosen = drawn.expand(len(query), -1, -1)
            drawn_keys, drawn_values = _at(keys, chosen), _at(values, chosen)
            far = cut[0] @ drawn_keys[:, :, None].transpose(3, 4) * self.scaling + math.log(count / self.samples)
            own = drawn[:, None] // self.block == numbers
            scores = torch.cat([scores, far.masked_fill(own[:, :, None], -torch.inf)], -1)
        weights = scores.softmax(-1)
        result = weights[..., : self.block] @ cut[2] + weights[..., self.block :] @ drawn_values[:, :, None]
        found = torch.cat([result, scores.logsumexp(-1, keepdim=True)], -1).flatten(2, 3)[:, :, :size]
        found = _at(found, order.argsort(2))
        return found[..., :-1], found[..., -1:]

    def directions(self, width: int, device: torch.device) -> Tensor:
        """ω [D, p]."""
        draw = torch.Generator().manual_seed(self._mixed(0, 0))
        return torch.randn(width, self.projections, generator=draw).to(device)

    def drawn(self, first: int, count: int, heads: int, device: torch.device) -> Tensor:
        """Which of the sorted keys are drawn for each head, int64 [H, m].

        Args:
            first: Position of the first of the keys.
            count: Their number.
        """
        draw = torch.Generator().manual_seed(self._mixed(first, count))
        return torch.randint(count, (heads, self.samples), generator=draw).to(device)

    def _mixed(self, first: int, count: int) -> int:
        mixed = ((self.seed[0] * 1_000_003 + self.seed[1]) * 1_000_003 + first) * 1_000_003 + count
        return mixed % (1 << 63)


def ranks(states: Tensor, directions: Tensor) -> Tensor:
    """Places [B, H, T] of the hashes of vectors in an order in which neighbours differ in one bit: that of reflected Gray codes."""
    bits = directions.shape[1]
    place = ((states @ directions > 0) * (1 << torch.arange(bits, device=states.device))).sum(-1)
    shift = 1
    while shift < bits:
        place, shift = place ^ (place >> shift), 2 * shift
    return place


def merged(one: Part, other: Part) -> Part:
    """The result over the keys of both."""
    sums = torch.logaddexp(one[1], other[1])
    return one[0] * (one[1] - sums).exp() + other[0] * (other[1] - sums).exp(), sums


def _at(states: Tensor, places: Tensor) -> Tensor:
    """Of [B, H, T, D] what stands at places [B, H, n]."""
    return states.gather(2, places[..., None].expand(-1, -1, -1, states.shape[3]))


def _cut(states: Tensor, blocks: int, size: int) -> Tensor:
    """[B, H, T, D] as blocks [B, H, blocks, size, D], the last filled up with zeros."""
    return functional.pad(states, (0, 0, 0, blocks * size - states.shape[2])).unflatten(2, (blocks, size))
