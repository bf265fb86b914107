"""Policies of the slot `attention` whose tokens see a fixed set of earlier ones; the cache keeps all of them.

With t the position of a token and j that of one that it may see, j ≤ t:

    strided     t - j < ℓ  or  (t - j) mod ℓ = 0
    fixed       ⌊j / ℓ⌋ = ⌊t / ℓ⌋  or  j mod ℓ ≥ ℓ - c
    longformer  t - j < w · d and (t - j) mod d = 0  or  j < g
    bigbird     blocks of b: of the last w blocks, the first g, or r random earlier ones, drawn for each head
    blockbert   blocks of b: of the block π(i) of its head, i that of t; of i where π(i) would be before the text

Sources: Sparse Transformer (arXiv 1904.10509, §4.3: the first two), Longformer (arXiv 2004.05150, §3.1: window w, dilation d, g global
tokens), BigBird (arXiv 2007.14062, §2), Blockwise BERT (arXiv 1911.02972, §3.2). All of them are causal here: what a bidirectional pattern
shows of later tokens is left out. One new token reads only the keys that it sees, of each head its own; many at once are masked, some at a
time. A head's random blocks depend on seed, layer, head and block alone.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from slimbench.methods.formats.attention.policy import ALL, OperatorPolicy, positive
from slimbench.methods.formats.policy import Scoring

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.formats.attention.operators.interface import Operator, Rotary


class Pattern(OperatorPolicy):
    """What a token sees, by positions alone."""

    slot = "attention"
    trainable = True

    @property
    def scoring(self) -> Scoring:
        return "exact"

    @abstractmethod
    def seen(self, at: Tensor, keys: Tensor, layer: int, heads: int) -> Tensor:
        """Whether tokens see earlier ones and themselves, bool [heads, T, K], or [1, T, K] where heads do not differ; what is said of later
        ones counts for nothing.

        Args:
            at: Their positions, int64 [T, 1], each the one before and 1.
            keys: Positions of the others, 0, 1, …, int64 [1, K].
        """

    @abstractmethod
    def counts(self, at: Tensor) -> Tensor:
        """How many tokens each token sees, itself included, [T], mean over heads.

        Args:
            at: Their positions, int64 [T].
        """

    def exact_keys(self, tokens: int, prompt: int = 0) -> int:
        import torch

        return round(float(self.counts(torch.arange(tokens)).sum()))

    def operator(self, rotary: Rotary, scaling: float, layer: int) -> Operator:
        from slimbench.methods.formats.attention.operators.pattern import PatternOperator

        return PatternOperator(rotary, scaling, self, layer)


@dataclass(frozen=True)
class Strided(Pattern):
    """The newest `stride` tokens, and each `stride`-th before."""

    kind = "strided"

    stride: int

    def __post_init__(self) -> None:
        positive(stride=self.stride)

    def neutral(self) -> Strided:
        return Strided(ALL)

    def seen(self, at: Tensor, keys: Tensor, layer: int, heads: int) -> Tensor:
        distance = at - keys
        return ((distance < self.stride) | (distance % self.stride == 0))[None]

    def counts(self, at: Tensor) -> Tensor:
        return (at + 1).clamp(max=self.stride) + at // self.stride


@dataclass(frozen=True)
class Fixed(Pattern):
    """Blocks of `stride` tokens: one's own, and the last `summary` tokens of each before."""

    kind = "fixed"

    stride: int
    summary: int

    def __post_init__(self) -> None:
        positive(stride=self.stride, summary=self.summary)
        if self.summary >= self.stride:
            raise ValueError(f"summary must be below the stride of {self.stride}, or everything is seen, not {self.summary}")

    def neutral(self) -> Fixed:
        return Fixed(ALL, self.summary)

    def seen(self, at: Tensor, keys: Tensor, layer: int, heads: int) -> Tensor:
        return ((keys // self.stride == at // self.stride) | (keys % self.stride >= self.stride - self.summary))[None]

    def counts(self, at: Tensor) -> Tensor:
        return at % self.stride + 1 + at // self.stride * min(self.summary, self.stride)


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

    def seen(self, at: Tensor, keys: Tensor, layer: int, heads: int) -> Tensor:
        distance = at - keys
        near = (distance < self.window * self.dilation) & (distance % self.dilation == 0)
        return (near | (keys < self.world))[None]

    def counts(self, at: Tensor) -> Tensor:
        world = (at + 1).clamp(max=self.world)
        farthest = at.clamp(max=self.window * self.dilation - 1) // self.dilation
        of_both = (farthest - (at - world) // self.dilation).clamp(min=0)
        return farthest + 1 + world - of_both


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

    def neutral(self) -> BigBird:
        return BigBird(self.block, ALL, self.world, 0)

    def seen(self, at: Tensor, keys: Tensor, layer: int, heads: int) -> Tensor:
        import torch

        row, column = at // self.block, keys // self.block
        found = ((row - column < self.window) | (column < self.world))[None]
        if not self.random:
            return found
        low, high = int(row[0]), int(row[-1])
        places = [(head, own) for head in range(heads) for own in range(low, high + 1)]
        drawn = [(head, own - low, block) for head, own in places for block in self.drawn(own, layer, head)]
        table = torch.zeros(heads, high - low + 1, high + 1, dtype=torch.bool)
        if drawn:
            table[tuple(torch.tensor(drawn).T)] = True
        table = table.to(keys.device)
        return found | table.index_select(1, row[:, 0] - low).index_select(2, column[0].clamp(max=high))

    def counts(self, at: Tensor) -> Tensor:
        row = at // self.block
        behind = (row - self.window + 1).clamp(min=0)
        others = (behind - self.world).clamp(min=0, max=self.random)
        return at % self.block + 1 + self.block * (row - behind + behind.clamp(max=self.world) + others)

    def drawn(self, block: int, layer: int, head: int) -> tuple[int, ...]:
        """The random blocks that a block sees: of those between the first and the window."""
        between = max(0, block - self.window + 1 - self.world)
        mixed = ((self.seed * 1_000_003 + layer) * 1_000_003 + head) * 1_000_003 + block
        return tuple(self.world + place for place in _drawn(between, self.random, mixed % (1 << 63)))


@lru_cache(maxsize=1 << 18)
def _drawn(count: int, wanted: int, seed: int) -> tuple[int, ...]:
    """As many places as are wanted of the first `count`, or all of them."""
    import torch

    return tuple(torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:wanted].tolist())


@dataclass(frozen=True)
class BlockBert(Pattern):
    """Blocks of `block` tokens: the one of the permutation of its head, a shift by 0, 1, … of `shifts` blocks."""

    kind = "blockbert"

    block: int
    shifts: int

    def __post_init__(self) -> None:
        positive(block=self.block, shifts=self.shifts)

    def neutral(self) -> BlockBert:
        return BlockBert(ALL, self.shifts)

    def seen(self, at: Tensor, keys: Tensor, layer: int, heads: int) -> Tensor:
        import torch

        row, column = at // self.block, keys // self.block
        shifts = torch.arange(heads if self.shifts > 1 else 1, device=keys.device)[:, None, None] % self.shifts
        return column == torch.where(row < shifts, row, row - shifts)

    def counts(self, at: Tensor) -> Tensor:
        """Mean over shifts: heads that take each as often."""
        row, inside = at // self.block, at % self.block + 1
        back = row.clamp(max=self.shifts - 1)
        return (inside * (self.shifts - back) + self.block * back) / self.shifts
