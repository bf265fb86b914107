"""The attentions of `methods.formats.attention.content`."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

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
from slimbench.methods.formats.attention.policy import ALL

_QUERIES = 256
"""Tokens of which it is held at once what they see."""


class ContentOperator(Operator):
    """Keeps `keys` and `values` of all tokens, and what tells who sees them.

    Args:
        always: Length up to which a text sees everything.
    """

    of_rotated: ClassVar[bool] = False
    """Rotated queries and keys are judged."""

    def __init__(self, rotary: Rotary, scaling: float, always: int) -> None:
        super().__init__(rotary, scaling)
        self.always = always

    @abstractmethod
    def follow(self, query: Tensor, key: Tensor, held: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """What decides for new tokens, [B, H, T, …], and what is kept of all of them beside keys and values.

        Args:
            query: [B, H, T, D].
            key: [B, G, T, D].
            held: What was kept of earlier ones.
        """

    @abstractmethod
    def seen(self, asked: Tensor, beside: dict[str, Tensor], at: Tensor, places: Tensor) -> Tensor:
        """Whether tokens see others, bool [B, H, T, K]; what is said of themselves and later ones counts for nothing.

        Args:
            asked: What decides for them.
            beside: What is kept.
            at: Their positions, int64 [T, 1].
            places: Those of the others, 0, 1, …, int64 [1, K].
        """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, kept: Kept | None) -> Tensor:
        first, tokens = self.first(query, kept), query.shape[2]
        held = kept.tensors_by_name if kept else {}
        turned = self.rotary(query, first), self.rotary(key, first)
        beside: dict[str, Tensor] = {}
        asked = query
        if self.always < ALL:
            asked, beside = self.follow(*(turned if self.of_rotated else (query, key)), held)
        keys, values = joined(held.get("keys"), turned[1]), joined(held.get("values"), value)
        if kept:
            kept.keep({"keys": keys, "values": values} | beside)
        count = keys.shape[2]
        if count <= self.always:
            return attention(turned[0], keys, values, self.scaling, earlier_and_itself(first, tokens, count, query.device))
        if tokens == 1:
            return self._one(turned[0], keys, values, asked, beside)
        heads, found = query.shape[1], []
        keys, values = (repeated(part, heads) for part in (keys, values))
        for begin in range(0, tokens, _QUERIES):
            span = slice(begin, begin + _QUERIES)
            until = min(count, first + begin + _QUERIES)
            at = torch.arange(first + begin, until, device=query.device)[:, None]
            places = torch.arange(until, device=query.device)[None]
            seen = (self.seen(asked[:, :, span], beside, at, places) | (places == at)) & (places <= at)
            found.append(attention(turned[0][:, :, span], keys[:, :, :until], values[:, :, :until], self.scaling, seen))
        return torch.cat(found, 2)

    def _one(self, query: Tensor, keys: Tensor, values: Tensor, asked: Tensor, beside: dict[str, Tensor]) -> Tensor:
        """One token, the last: each head reads what it sees, and as many more as the widest needs, masked."""
        places = torch.arange(keys.shape[2], device=query.device)[None]
        seen = (self.seen(asked, beside, places[:, -1:], places) | (places == places[:, -1:]))[:, :, 0]
        widest = int(seen.sum(-1).max())
        chosen = (~seen).to(torch.uint8).argsort(dim=-1, stable=True)[..., :widest]
        keys, values = (of_each_head(part, chosen) for part in (keys, values))
        return attention(query, keys, values, self.scaling, seen.gather(-1, chosen)[:, :, None])


class _CodesOperator(ContentOperator):
    """Keeps `codes` of keys, int16 [B, G, K, R]: a token sees those that share one of the R with its query."""

    @abstractmethod
    def codes(self, states: Tensor, groups: int) -> Tensor:
        """Codes [B, H, T, R] of queries or keys [B, H, T, D], whose heads belong to G groups of consecutive ones."""

    @abstractmethod
    def near(self, at: Tensor, places: Tensor) -> Tensor:
        """Whether tokens see others whatever their codes, bool [T, K]."""

    def follow(self, query: Tensor, key: Tensor, held: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        groups = key.shape[1]
        asked, theirs = (self.codes(part, groups).to(torch.int16) for part in (query, key))
        return asked, {"codes": joined(held.get("codes"), theirs)}

    def seen(self, asked: Tensor, beside: dict[str, Tensor], at: Tensor, places: Tensor) -> Tensor:
        theirs = repeated(beside["codes"][:, :, : places.shape[1]], asked.shape[1])
        found = self.near(at, places)
        for own, other in zip(asked.unbind(-1), theirs.unbind(-1), strict=True):
            found = found | (own[..., None] == other[:, :, None])
        return found


class LshOperator(_CodesOperator):
    """Codes are hashes.

    Args:
        hashes: Their number, and how many values each may have.
        local: Tokens of a chunk; 0: none.
        seed: And the layer.
    """

    of_rotated = True

    def __init__(self, rotary: Rotary, scaling: float, hashes: tuple[int, int], local: int, seed: tuple[int, int]) -> None:
        super().__init__(rotary, scaling, max(1, 2 * local))
        self.hashes, self.local, self.seed = hashes, local, seed
        self._drawn: dict[tuple[int, int, torch.device], Tensor] = {}

    def near(self, at: Tensor, places: Tensor) -> Tensor:
        return at // self.local - places // self.local <= 1 if self.local else places == at

    def codes(self, states: Tensor, groups: int) -> Tensor:
        directions = self.directions(groups, states.shape[-1], states.device)
        return hashes(states, directions.repeat_interleave(states.shape[1] // groups, 0))

    def directions(self, groups: int, width: int, device: torch.device) -> Tensor:
        """R [G, D, rounds, b / 2]."""
        if (groups, width, device) not in self._drawn:
            rounds = [self._draw(index, groups, width) for index in range(self.hashes[0])]
            self._drawn[groups, width, device] = torch.stack(rounds, 2).to(device)
        return self._drawn[groups, width, device]

    def _draw(self, index: int, groups: int, width: int) -> Tensor:
        mixed = (self.seed[0] * 1_000_003 + self.seed[1]) * 1_000_003 + index
        return torch.randn(groups, width, self.hashes[1] // 2, generator=torch.Generator().manual_seed(mixed % (1 << 63)))


class RoutingOperator(_CodesOperator):
    """Codes are centroids.

    Args:
        means: [G, C, D]; None where everything is seen.
        window: Newest tokens, the token itself among them.
    """

    def __init__(self, rotary: Rotary, scaling: float, means: Tensor | None, window: int) -> None:
        super().__init__(rotary, scaling, window)
        self.window = window
        self.means: Tensor
        self.register_buffer("means", torch.empty(0) if means is None else means.float(), persistent=False)

    def near(self, at: Tensor, places: Tensor) -> Tensor:
        return at - places < self.window

    def codes(self, states: Tensor, groups: int) -> Tensor:
        if self.means.device != states.device:
            self.means = self.means.to(states.device)
        means = self.means.repeat_interleave(states.shape[1] // groups, 0)
        return torch.einsum("bhtd,hcd->bhtc", states.float(), means).argmax(-1, keepdim=True)


class SinkhornOperator(ContentOperator):
    """Keeps of each block that is whole `pooled`, the mean of its keys [B, G, J, D], and `matched`, the blocks that the one after it sees,
    int32 [B, H, J, m], -1 where there are fewer; `columns` [B, H, n, J], logarithms of the sums so far of each iteration; of the block that
    is not whole the sums `open_queries` [B, H, 1, D] and `open_keys` [B, G, 1, D].
    """

    def __init__(self, rotary: Rotary, scaling: float, block: int, blocks: int, iterations: int, temperature: float) -> None:
        super().__init__(rotary, scaling, ALL if block >= ALL else block * (blocks + 1))
        self.block, self.blocks, self.iterations, self.temperature = block, blocks, iterations, temperature

    def follow(self, query: Tensor, key: Tensor, held: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        first, tokens = held["keys"].shape[2] if held else 0, query.shape[2]
        queries = self._sums(query, first, held.get("open_queries"))
        keys = self._sums(key, first, held.get("open_keys"))
        pooled = joined(held.get("pooled"), keys[:, :, :-1] / self.block)
        size = query.shape[:2]
        columns = held.get("columns", keys.new_zeros(*size, self.iterations, 0))
        matched = held.get("matched", torch.zeros(*size, 0, self.blocks, dtype=torch.int32, device=query.device))
        columns, matched = self._match(queries[:, :, :-1] / self.block, pooled, columns, matched)
        rows = torch.arange(first, first + tokens, device=query.device) // self.block
        asked = functional.pad(matched, (0, 0, 1, 0), value=-1).index_select(2, rows)
        still_open = {"open_queries": queries[:, :, -1:].clone(), "open_keys": keys[:, :, -1:].clone()}
        return asked, {"pooled": pooled, "columns": columns, "matched": matched} | still_open

    def _sums(self, states: Tensor, first: int, before: Tensor | None) -> Tensor:
        """Sums over the tokens of each block that was not whole yet, float32 [B, H, blocks, D]; of the last one there may be no token.

        Args:
            states: Queries or keys of tokens at first, first + 1, ….
            before: Sums of the earlier tokens of the first block.
        """
        ahead = first % self.block
        behind = self.block - (ahead + states.shape[2]) % self.block
        sums = functional.pad(states.float(), (0, 0, ahead, behind)).unflatten(2, (-1, self.block)).sum(3)
        if before is not None:
            sums[:, :, :1] += before
        return sums

    def _match(self, queries: Tensor, pooled: Tensor, columns: Tensor, matched: Tensor) -> tuple[Tensor, Tensor]:
        """`columns` and `matched` after further blocks, whose mean queries are [B, H, new, D]."""
        grouped = queries.unflatten(1, (pooled.shape[1], -1))
        scores = torch.einsum("bgqsd,bgjd->bgqsj", grouped, pooled).flatten(1, 2) * (self.scaling / self.temperature)
        for new in range(queries.shape[2]):
            number = matched.shape[2] + 1
            row, alike = scores[:, :, new, :number], 1 / torch.arange(number, 0, -1, device=scores.device)
            wanted = alike.cumsum(0).flip(0).log()
            columns, sums = functional.pad(columns, (0, 1), value=-torch.inf), []
            for earlier in columns.unbind(2):
                row = row - row.logsumexp(-1, keepdim=True)
                sums.append(torch.logaddexp(earlier, row))
                row = row - sums[-1] + wanted
            columns = torch.stack(sums, 2)
            best = row.topk(min(self.blocks, row.shape[-1])).indices.sort(-1).values.int()
            best = functional.pad(best, (0, self.blocks - best.shape[-1]), value=-1)
            matched = torch.cat([matched, best[:, :, None]], 2)
        return columns, matched

    def seen(self, asked: Tensor, beside: dict[str, Tensor], at: Tensor, places: Tensor) -> Tensor:
        column = places[0] // self.block
        count = int(column[-1]) + 1
        table = torch.zeros(*asked.shape[:3], count + 1, dtype=torch.bool, device=asked.device)
        table = table.scatter_(3, torch.where(asked < 0, count, asked).long(), True)
        return table.index_select(3, column) | (column[None] == at // self.block)


def hashes(states: Tensor, directions: Tensor) -> Tensor:
    """Hashes [B, H, T, rounds] of vectors [B, H, T, D], by directions [H, D, rounds, b / 2]."""
    turned = torch.einsum("bhtd,hdrn->bhtrn", states.float(), directions)
    return torch.cat([turned, -turned], -1).argmax(-1)
