"""Policies of the slot `attention` whose tokens see a fixed set of earlier ones; the cache keeps all of them.

With t the position of a token and j that of one that it may see, j ≤ t:

    strided     t - j < ℓ  or  (t - j) mod ℓ = 0
    fixed       ⌊j / ℓ⌋ = ⌊t / ℓ⌋  or  j mod ℓ ≥ ℓ - c
    longformer  t - j < w · d and (t - j) mod d = 0  or  j < g
    bigbird     blocks of b: of the last w blocks, the first g, or r random earlier ones, drawn for each head
    blockbert   blocks of b: of t's own block i, or of π(i) of its head

Sources: Sparse Transformer (arXiv 1904.10509, §4.3: the first two), Longformer (arXiv 2004.05150, §3.1: window w, dilation d, g global
tokens), BigBird (arXiv 2007.14062, §2), Blockwise BERT (arXiv 1911.02972, §3.2). All of them are causal here: what a bidirectional pattern
shows of later tokens is left out. One new token reads only the keys that it sees; many at once are masked, in the same operator. A head's
random blocks depend on seed, layer, head and block alone.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slimbench.methods.formats.attention.policy import ALL, OperatorPolicy, positive
from slimbench.methods.formats.policy import Scoring

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.formats.attention.operators.interface import Operator, Rotary


class Pattern(OperatorPolicy):
    """What a token sees, by positions alone."""

    slot = "attention"

    @property
    def scoring(self) -> Scoring:
        return "exact"

    @property
    def by_head(self) -> bool:
        """Whether heads see different tokens."""
        return False

    @abstractmethod
    def seen(self, at: Tensor, keys: Tensor, layer: int, head: int) -> Tensor:
        """Whether tokens see earlier ones and themselves, bool [T, K]; what is said of later ones counts for nothing.

        Args:
            at: Their positions, int64 [T, 1].
            keys: Positions of the others, int64 [1, K].
        """

    def exact_keys(self, tokens: int) -> int:
        import torch

        at = torch.arange(tokens)
        return int((self.seen(at[:, None], at[None], 0, 0) & (at[None] <= at[:, None])).sum())

    def operator(self, rotary: Rotary, scaling: float, layer: int) -> Operator:
        from slimbench.methods.formats.attention.operators.pattern import PatternOperator

        return PatternOperator(rotary, scaling, lambda at, keys, head: self.seen(at, keys, layer, head), self.by_head)


@dataclass(frozen=True)
class Strided(Pattern):
    """The newest `stride` tokens, and each `stride`-th before."""

    kind = "strided"

    stride: int

    def __post_init__(self) -> None:
        positive(stride=self.stride)

    def neutral(self) -> Strided:
        return Strided(ALL)

    def seen(self, at: Tensor, keys: Tensor, layer: int, head: int) -> Tensor:
        distance = at - keys
        return (distance < self.stride) | (distance % self.stride == 0)


@dataclass(frozen=True)
class Fixed(Pattern):
    """Blocks of `stride` tokens: one's own, and the last `summary` tokens of each before."""

    kind = "fixed"

    stride: int
    summary: int

    def __post_init__(self) -> None:
        positive(stride=self.stride, summary=self.summary)

    def neutral(self) -> Fixed:
        return Fixed(ALL, self.summary)

    def seen(self, at: Tensor, keys: Tensor, layer: int, head: int) -> Tensor:
        return (keys // self.stride == at // self.stride) | (keys % self.stride >= self.stride - self.summary)


@dataclass(frozen=True)
class Longformer(Pattern):
    """`window` tokens, each `dilation`-th, and the first `world` tokens of the text."""

    kind = "longformer"

    window: int
    world: int
    dilation: int = 1

    def __post_init__(self) -> None:
        positive(window=self.window, dilation=self.dilation)
        if self.world < 0:
            raise ValueError(f"world must not be negative, not {self.world}")

    def neutral(self) -> Longformer:
        return Longformer(ALL, self.world, 1)

    def seen(self, at: Tensor, keys: Tensor, layer: int, head: int) -> Tensor:
        distance = at - keys
        near = (distance < self.window * self.dilation) & (distance % self.dilation == 0)
        return near | (keys < self.world)


@dataclass(frozen=True)
class BigBird(Pattern):
    """Blocks of `block` tokens: the last `window`, the first `world`, and `random` others of the earlier ones."""

    kind = "bigbird"

    block: int
    window: int
    world: int
    random: int
    seed: int = 0

    def __post_init__(self) -> None:
        positive(block=self.block, window=self.window)
        if self.world < 0 or self.random < 0:
            raise ValueError(f"world and random must not be negative, not {self.world} and {self.random}")

    @property
    def by_head(self) -> bool:
        return self.random > 0

    def neutral(self) -> BigBird:
        return BigBird(self.block, ALL, self.world, 0)

    def seen(self, at: Tensor, keys: Tensor, layer: int, head: int) -> Tensor:
        import torch

        row, column = at // self.block, keys // self.block
        found = (row - column < self.window) | (column < self.world)
        for own in row.unique().tolist() if self.random else ():
            drawn = self.drawn(own, layer, head)
            if len(drawn):
                found = found | ((row == own) & torch.isin(column, drawn.to(column.device)))
        return found

    def drawn(self, block: int, layer: int, head: int) -> Tensor:
        """The random blocks that a block sees: of those between the first and the window."""
        import torch

        between = max(0, block - self.window + 1 - self.world)
        mixed = ((self.seed * 1_000_003 + layer) * 1_000_003 + head) * 1_000_003 + block
        order = torch.randperm(between, generator=torch.Generator().manual_seed(mixed % (1 << 63)))
        return self.world + order[: self.random]


@dataclass(frozen=True)
class BlockBert(Pattern):
    """Blocks of `block` tokens: one's own and that of the permutation of its head, a shift by 0, 1, … of `shifts` blocks."""

    kind = "blockbert"

    block: int
    shifts: int

    def __post_init__(self) -> None:
        positive(block=self.block, shifts=self.shifts)

    @property
    def by_head(self) -> bool:
        return self.shifts > 1

    def neutral(self) -> BlockBert:
        return BlockBert(ALL, self.shifts)

    def seen(self, at: Tensor, keys: Tensor, layer: int, head: int) -> Tensor:
        row, column = at // self.block, keys // self.block
        return (column == row) | (column == row - head % self.shifts)
