"""The attention of `methods.formats.attention.eviction`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from slimbench.methods.formats.attention.operators.interface import Kept, Operator, Rotary, attention, earlier_and_itself, joined
from slimbench.methods.formats.attention.policy import FIRST, OBSERVED

_SMOOTHED = 5
_QUERIES = 256
"""Tokens whose weights are held at once."""


class EvictionOperator(Operator):
    """Keeps `keys` and `values` [B, G, K, D], and with `h2o` and `random` `scores` [B, G, K], in the order of the text."""

    decides_after = True

    def __init__(self, rotary: Rotary, scaling: float, rule: str, budget: int, seed: tuple[int, int]) -> None:
        super().__init__(rotary, scaling)
        self.rule, self.budget, self.seed = rule, budget, seed

    def forward(self, query: Tensor, key: Tensor, value: Tensor, kept: Kept | None) -> Tensor:
        first, tokens = self.first(query, kept), query.shape[2]
        held = kept.tensors_by_name if kept else {}
        keys, values = joined(held.get("keys"), self.rotary(key, first)), joined(held.get("values"), value)
        query = self.rotary(query, first)
        seen = earlier_and_itself(keys.shape[2] - tokens, tokens, keys.shape[2], query.device)
        result = attention(query, keys, values, self.scaling, seen)
        if kept is None:
            return result
        if kept.reading is not None and not first:
            kept.reading = reading(query, keys, values, self.scaling)
            self.decide(kept.reading, kept)
        else:
            kept.keep(self._after({"keys": keys, "values": values}, held.get("scores"), query, first))
        return result

    def decide(self, reading: dict[str, Tensor], kept: Kept) -> None:
        """See `Operator`; by a `reading`."""
        held = {name: reading[name] for name in ("keys", "values")}
        kept.keep(self._after(held, None, reading["observed"], 0, reading["sums"]))

    def _after(
        self, held: dict[str, Tensor], scores: Tensor | None, query: Tensor, first: int, sums: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What is held after a pass.

        Args:
            scores: Those of the tokens before it.
            query: Rotated; where `sums` are given, the last ones are enough.
            sums: Of each key the weights that it got; None: not yet known.
        """
        rule, budget, count = self.rule, self.budget, held["keys"].shape[2]
        if rule == "h2o":
            held["scores"] = received(query, held["keys"], self.scaling, scores) if sums is None else sums
        elif rule == "random":
            held["scores"] = self._drawn(held["keys"], scores, first)
        if count <= budget or (rule == "snapkv" and first):
            return held
        oldest = FIRST if rule == "spatten" else 0
        newest = {"h2o": budget // 2, "snapkv": OBSERVED, "spatten": (budget - FIRST) // 2}.get(rule, 1)
        judged = held["scores"] if "scores" in held else self._judged(query, held["keys"], sums)
        chosen = judged[..., oldest : count - newest].topk(budget - oldest - newest).indices.sort(-1).values + oldest
        ends = [torch.arange(*span, device=chosen.device).expand(*chosen.shape[:2], -1) for span in ((0, oldest), (count - newest, count))]
        return {name: _taken(tensor, torch.cat([ends[0], chosen, ends[1]], -1)) for name, tensor in held.items()}

    def _judged(self, query: Tensor, keys: Tensor, sums: Tensor | None) -> Tensor:
        """Scores [B, G, K] that need none of before."""
        if self.rule == "knorm":
            return -keys.norm(dim=-1)
        if self.rule == "spatten":
            return received(query, keys, self.scaling) if sums is None else sums
        if self.rule == "tova":
            newest = _weights(query[:, :, -1:], keys, self.scaling)
            return newest.mean((1, 2))[:, None].expand(-1, keys.shape[1], -1)
        observed = _weights(query[:, :, -OBSERVED:], keys, self.scaling).mean(2)
        outside = observed.shape[-1] - OBSERVED
        smooth = functional.avg_pool1d(observed[..., :outside], _SMOOTHED, 1, _SMOOTHED // 2)
        return functional.pad(_of_groups(smooth, keys.shape[1]), (0, OBSERVED))

    def _drawn(self, keys: Tensor, scores: Tensor | None, first: int) -> Tensor:
        """Those that were drawn for earlier tokens, and new ones by seed, layer and position alone, the same for all texts of a batch."""
        before = 0 if scores is None else scores.shape[-1]
        draws = [self._draw(first + place, keys.shape[1]) for place in range(keys.shape[2] - before)]
        new = torch.stack(draws, -1).to(keys.device).expand(len(keys), -1, -1)
        return new if scores is None else torch.cat([scores, new], -1)

    def _draw(self, position: int, heads: int) -> Tensor:
        mixed = (self.seed[0] * 1_000_003 + self.seed[1]) * 1_000_003 + position
        return torch.rand(heads, generator=torch.Generator().manual_seed(mixed % (1 << 63)))


def reading(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> dict[str, Tensor]:
    """What operators decide by that see a prompt as a dense model does: `keys` and `values` of all its tokens, `observed`, its last
    queries, and `sums`, as of `received`.

    Args:
        query: Rotated, as `keys`.
    """
    return {"keys": keys, "values": values, "observed": query[:, :, -OBSERVED:].contiguous(), "sums": received(query, keys, scaling)}


def received(query: Tensor, keys: Tensor, scaling: float, scores: Tensor | None = None) -> Tensor:
    """Of each key the weights that it got, those of earlier passes included, float32 [B, G, K]."""
    total = query.new_zeros((*keys.shape[:3],), dtype=torch.float32)
    if scores is not None:
        total[..., : scores.shape[-1]] += scores
    ahead = keys.shape[2] - query.shape[2]
    for begin in range(0, query.shape[2], _QUERIES):
        part = query[:, :, begin : begin + _QUERIES]
        until = ahead + begin + part.shape[2]
        total[..., :until] += _of_groups(_weights(part, keys[:, :, :until], scaling).sum(2), keys.shape[1])
    return total


def _weights(query: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Weights of the attention, float32 [B, H, T, K]; the queries are the last tokens of the keys."""
    count, tokens = keys.shape[2], query.shape[2]
    grouped = query.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
    scores = (grouped @ keys.transpose(2, 3)).unflatten(2, (-1, tokens)).flatten(1, 2).float() * scaling
    if tokens > 1:
        later = torch.ones(tokens, count, dtype=torch.bool, device=query.device).triu(count - tokens + 1)
        scores = scores.masked_fill(later, -torch.inf)
    return torch.softmax(scores, -1)


def _of_groups(weights: Tensor, groups: int) -> Tensor:
    """Mean over the heads of queries [B, H, K] that share one of keys: [B, G, K]."""
    return weights.unflatten(1, (groups, -1)).mean(2)


def _taken(tensor: Tensor, places: Tensor) -> Tensor:
    """The tokens at some places [B, G, n] of keys or values [B, G, K, D] or scores [B, G, K]."""
    return tensor.gather(2, places if tensor.dim() == 3 else places[..., None].expand(-1, -1, -1, tensor.shape[3]))
