"""The base of a model whose prompts lose tokens on their way (`methods.formats.depth.reduction`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slimbench.methods.base import Unsupported
from slimbench.methods.formats.architecture.layout import layout_of
from slimbench.methods.formats.attention.operators.eviction import received
from slimbench.methods.formats.depth.rows import Hear, Partial, run_block


class Reduced(Partial):
    """Arguments as of `methods.formats.depth.reduction.Reduction`.

    Args:
        count: Tokens that go on of a prompt of so many.

    Attributes:
        times: How many tokens ran so many blocks since this was made; the policy's own count.
    """

    batched = True

    def __init__(self, model: Any, layer: int, count: Callable[[int], int]) -> None:
        super().__init__(model)
        self.layer, self.count, self.times = layer, count, Counter[int]()
        if not hasattr(_attention(self._base[0].layers[layer - 1]), "k_proj"):
            raise Unsupported(f"block {layer} has no attention, by which tokens would be judged")

    def through(self, hidden: Tensor, rotations: tuple[Tensor, Tensor], cache: Any, first: int) -> Tensor:
        texts, tokens = hidden.shape[:2]
        blocks, count = self._base[0].layers[: self.blocks], tokens if first else self.count(tokens)
        heard: list[Tensor] = []

        def hear(query: Tensor, key: Tensor, scaling: float) -> None:
            heard.append(importance(query, key, scaling))

        for index, block in enumerate(blocks[: self.layer], start=1):
            hidden = _run(block, hidden, rotations, cache, hear if count < tokens and index == self.layer else None)
        self._count(self.layer, texts * (tokens - count))
        self._count(self.blocks, texts * count)
        if not heard:
            return self._ended(hidden, rotations, cache)
        places = chosen(heard[0], count)
        going = self._ended(taken(hidden, places), (taken(rotations[0], places), taken(rotations[1], places)), cache)
        return hidden.scatter(1, places[..., None].expand_as(going), going)

    def _ended(self, hidden: Tensor, rotations: tuple[Tensor, Tensor], cache: Any) -> Tensor:
        """States behind all blocks, of tokens whose states behind those that all run are given."""
        for block in self._base[0].layers[self.layer : self.blocks]:
            hidden = _run(block, hidden, rotations, cache)
        return hidden

    def _count(self, blocks: int, tokens: int) -> None:
        if tokens:
            self.times[blocks] += tokens

    def tokens_by_blocks(self) -> dict[int, int]:
        return dict(self.times)


def importance(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Attention that each token of a text gets, mean over heads and over the queries that see it, float32 [B, T].

    Args:
        query: [B, H, T, D], rotated.
        key: [B, G, T, D], rotated.
        scaling: Factor of their products.
    """
    tokens = key.shape[2]
    return received(query, key, scaling).mean(1) / torch.arange(tokens, 0, -1, device=key.device)


def chosen(judged: Tensor, count: int) -> Tensor:
    """Places int64 [B, count], ascending, of the last token and of the others of largest importance [B, T], of equal ones the first."""
    last = judged.shape[1] - 1
    best = judged[:, :last].sort(dim=-1, descending=True, stable=True).indices[:, : count - 1]
    return torch.cat([best, best.new_full((len(judged), 1), last)], -1).sort(-1).values


def taken(rows: Tensor, places: Tensor) -> Tensor:
    """Of rows [B or 1, T, d] those at places [B, n] of each text: [B, n, d]."""
    return rows.expand(len(places), -1, -1).gather(1, places[..., None].expand(-1, -1, rows.shape[2]))


def _attention(block: Any) -> Any:
    return block.get_submodule(layout_of(block).attention)


def _run(block: Any, hidden: Tensor, rotations: tuple[Tensor, Tensor], cache: Any, hear: Hear | None = None) -> Tensor:
    """One block for all tokens that come to it, behind those that its own layer of the cache holds."""
    attention = _attention(block)
    held = cache.get_seq_length(attention.layer_idx) if cache is not None and hasattr(attention, "k_proj") else 0
    return run_block(block, hidden, torch.arange(hidden.shape[1], device=hidden.device), rotations, cache, held, hear)
