"""The attention of `methods.formats.attention.pooled`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, ParameterDict

from slimbench.methods.formats.attention.operators.interface import Kept, Operator, Rotary, attention, earlier_and_itself, joined, repeated
from slimbench.methods.formats.attention.policy import ALL

_QUERIES = 256
"""Tokens whose scores are held at once."""


class BlockOperator(Operator):
    """Keeps `keys`, not rotated, and `values` of the block that is not whole yet, and of whole ones `old_keys` and `old_values`.

    With `combiner` the heads of `old_values` are those of queries, and `asked` [B, H, 1, D] is the sum of the queries of the block that is
    not whole yet, in float32.

    Args:
        size: Tokens of a block, and its summaries.
        weights: `keys` and `values`, E and F [r, b]; what is not there averages stretches.
    """

    def __init__(self, rotary: Rotary, scaling: float, pooling: str, size: tuple[int, int], weights: Mapping[str, Tensor]) -> None:
        super().__init__(rotary, scaling)
        self.pooling, (self.block, self.summaries) = pooling, size
        held = (part if isinstance(part, Parameter) else Parameter(part, requires_grad=False) for part in weights.values())
        self.weights = ParameterDict({f"of_{name}": part for name, part in zip(weights, held, strict=True)})

    def forward(self, query: Tensor, key: Tensor, value: Tensor, kept: Kept | None) -> Tensor:
        if self.block >= ALL:
            return base(self, query, key, value, kept)
        first, held = self.first(query, kept), kept.tensors_by_name if kept else {}
        start = first // self.block * self.block
        own = {"keys": joined(held.get("keys"), key), "values": joined(held.get("values"), value)}
        turned, count = self.rotary(own["keys"], start), own["keys"].shape[2]
        whole = count // self.block
        if self.pooling == "combiner":
            own["asked"] = self._asked(query, held.get("asked"), first - start)
        old: dict[str, Tensor] = {name: part for name, part in held.items() if name in ("old_keys", "old_values")}
        if whole:
            old = {name: joined(old.get(name), made) for name, made in self._summaries(own, turned, whole, start).items()}
        if kept:
            rest = {name: _after(part, whole * (1 if name == "asked" else self.block)) for name, part in own.items()}
            kept.keep(old | (rest if count > whole * self.block else {}))
        return self._attended(self.rotary(query, first), turned, own["values"], old, first)

    def _asked(self, query: Tensor, earlier: Tensor | None, before: int) -> Tensor:
        """Sums of the queries of each block [B, H, blocks, D]; `before` of the first one came earlier."""
        places = torch.arange(before, before + query.shape[2], device=query.device) // self.block
        size = (*query.shape[:2], (before + query.shape[2] - 1) // self.block + 1, query.shape[3])
        sums = torch.zeros(size, device=query.device).index_add(2, places, query.float())
        return sums if earlier is None else torch.cat([sums[:, :, :1] + earlier, sums[:, :, 1:]], 2)

    def _summaries(self, own: Mapping[str, Tensor], turned: Tensor, whole: int, start: int) -> dict[str, Tensor]:
        """Keys, rotated, and values of the summaries of the first blocks, in the order of the text.

        Args:
            own: Keys, values and sums of queries, from `start` on.
            turned: The keys, rotated.
            whole: Number of the blocks.
        """
        stretch, tokens = self.block // self.summaries, whole * self.block
        middles = torch.arange(start + stretch // 2, start + tokens, stretch, device=turned.device)
        keys = self.rotary.at(self._projected(own["keys"][:, :, :tokens], "keys"), middles)
        values = own["values"][:, :, :tokens]
        if self.pooling == "projection":
            return {"old_keys": keys, "old_values": self._projected(values, "values")}
        asked = self.rotary.at((own["asked"][:, :, :whole] / self.block).to(turned.dtype), middles)
        theirs, many = (repeated(part[:, :, :tokens], asked.shape[1]).unflatten(2, (whole, -1)) for part in (turned, values))
        shares = torch.softmax((asked[:, :, :, None] @ theirs.transpose(3, 4)).float() * self.scaling, -1)
        return {"old_keys": keys, "old_values": (shares @ many.float())[:, :, :, 0].to(values.dtype)}

    def _projected(self, states: Tensor, which: str) -> Tensor:
        """Of the keys or values [B, G, n · b, D] of n blocks the summaries [B, G, n · r, D]."""
        if f"of_{which}" in self.weights:
            weight = self.weights[f"of_{which}"].float()
        else:
            each = torch.eye(self.summaries, device=states.device) * self.summaries / self.block
            weight = each.repeat_interleave(self.block // self.summaries, 1)
        return (weight @ states.unflatten(2, (-1, self.block)).float()).flatten(2, 3).to(states.dtype)

    def _attended(self, query: Tensor, keys: Tensor, values: Tensor, old: Mapping[str, Tensor], first: int) -> Tensor:
        """The result [B, H, T, D] for tokens from `first` on, some at a time, over the blocks that one of them sees.

        Args:
            query: Rotated.
            keys: Of the tokens since the beginning of the block of `first`, rotated; `values` likewise.
            old: Of all summaries.
        """
        start, device = first // self.block * self.block, query.device
        found = []
        for begin in range(first, first + query.shape[2], _QUERIES):
            part = query[:, :, begin - first : begin - first + _QUERIES]
            end, low = begin + part.shape[2], begin // self.block * self.block
            near, count = slice(low - start, end - start), (end - 1) // self.block * self.summaries
            theirs, many = keys[:, :, near], values[:, :, near]
            if count:
                heads = old["old_values"].shape[1]
                theirs = torch.cat([repeated(keyed, heads) for keyed in (old["old_keys"][:, :, :count], theirs)], 2)
                many = torch.cat([old["old_values"][:, :, :count], repeated(many, heads)], 2)
            at, places = torch.arange(begin, end, device=device)[:, None], torch.arange(low, end, device=device)[None]
            earlier = torch.arange(count, device=device)[None] // self.summaries < at // self.block
            same = (places // self.block == at // self.block) & (places <= at)
            seen = torch.cat([earlier, same], 1) if part.shape[2] > 1 else None
            found.append(attention(part, theirs, many, self.scaling, seen))
        return torch.cat(found, 2)


class SpanOperator(Operator):
    """Keeps of each length 2^l of spans `keys.l`, means of keys that are not rotated, and `values.l`, as far as later tokens see them.

    Args:
        count: k.
    """

    def __init__(self, rotary: Rotary, scaling: float, count: int) -> None:
        super().__init__(rotary, scaling)
        self.count = count

    def forward(self, query: Tensor, key: Tensor, value: Tensor, kept: Kept | None) -> Tensor:
        if self.count >= ALL:
            return base(self, query, key, value, kept)
        first, held = self.first(query, kept), kept.tensors_by_name if kept else {}
        end = first + query.shape[2]
        levels = end.bit_length()
        lowest = [max(0, low) for low, _ in reach(first, self.count, levels)]
        spans: list[tuple[Tensor, ...]] = []
        for level in range(levels):
            new: tuple[Tensor, ...] = key, value
            if level:
                new = tuple(_halved(part, *(2 * (at >> level) - lowest[level - 1] for at in (first, end))) for part in spans[-1])
            spans.append(tuple(joined(held.get(f"{name}.{level}"), part) for name, part in zip(("keys", "values"), new, strict=True)))
        if kept:
            gone = [max(0, low) - before for (low, _), before in zip(reach(end, self.count, levels), lowest, strict=True)]
            kept.keep(
                {
                    f"{name}.{level}": _after(part, gone[level])
                    for level, pair in enumerate(spans)
                    for name, part in zip(("keys", "values"), pair, strict=True)
                }
            )
        query = self.rotary(query, first)
        parts = query.split(_QUERIES, 2)
        return torch.cat([self._attended(part, spans, lowest, first + i * _QUERIES) for i, part in enumerate(parts)], 2)

    def _attended(self, query: Tensor, spans: list[tuple[Tensor, ...]], lowest: list[int], first: int) -> Tensor:
        """The result for tokens from `first` on.

        Args:
            query: Rotated.
            spans: Keys and values of each length, of which the first stands at the place of `lowest` among those of its length.
        """
        levels, tokens, device = len(spans), query.shape[2], query.device
        ends = zip(reach(first, self.count, levels), reach(first + tokens - 1, self.count, levels), strict=True)
        every = reach(torch.arange(first, first + tokens, device=device)[:, None], self.count, levels)
        parts: list[tuple[Tensor, ...]] = []
        for level, ((low, _), (_, high)) in enumerate(ends):
            low = max(0, low)
            high = max(low, high + 1)
            places = torch.arange(low, high, device=device)
            wanted = slice(low - lowest[level], high - lowest[level])
            middles, inside = (places << level) + (1 << level) // 2, (places >= every[level][0]) & (places <= every[level][1])
            parts.append((*(part[:, :, wanted] for part in spans[level]), middles, inside))
        keys, values, middles, seen = (torch.cat(part, dim) for part, dim in zip(zip(*parts, strict=True), (2, 2, 0, 1), strict=True))
        return attention(query, self.rotary.at(keys, middles), values, self.scaling, seen if tokens > 1 else None)


def reach(at: Any, count: int, levels: int) -> list[tuple[Any, Any]]:
    """For spans of 1, 2, 4, … the first and the last that tokens see, counted in their length; those before 0 are none.

    Args:
        at: Position of a token, or of several, int64.
        count: Spans of each length.
    """
    found, last, half = [], at - 1, -1
    for _ in range(levels):
        left = last - count
        found.append((left + (left & 1), last - half))
        last, half = left >> 1, 1 - (left & 1)
    return found


def base(operator: Operator, query: Tensor, key: Tensor, value: Tensor, kept: Kept | None) -> Tensor:
    """The attention of the base; `keys`, rotated, and `values` of all tokens are kept."""
    first, held = operator.first(query, kept), kept.tensors_by_name if kept else {}
    keys, values = joined(held.get("keys"), operator.rotary(key, first)), joined(held.get("values"), value)
    if kept:
        kept.keep({"keys": keys, "values": values})
    seen = earlier_and_itself(first, query.shape[2], keys.shape[2], query.device)
    return attention(operator.rotary(query, first), keys, values, operator.scaling, seen)


def _halved(states: Tensor, first: int, last: int) -> Tensor:
    """Means of pairs of neighbours, of keys or values [B, G, K, D] from `first` to `last`."""
    return ((states[:, :, first:last:2].float() + states[:, :, first + 1 : last : 2].float()) / 2).to(states.dtype)


def _after(states: Tensor, count: int) -> Tensor:
    """What follows the first of keys or values [B, G, K, D], in a memory of its own."""
    return states[:, :, count:].clone(memory_format=torch.contiguous_format) if count else states
