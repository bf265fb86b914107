"""Attention to a fixed set of earlier tokens (`methods.formats.attention.patterns`), laid on a model that was trained with all of them.

The papers train their models with the pattern; here it is put on a pretrained one. The whole cache stays: what these patterns save is
work in long prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slimbench.methods.base import Citation
from slimbench.methods.core.policies import PolicyMethod
from slimbench.methods.formats.attention import patterns
from slimbench.methods.formats.policy import Policy

_SUMMARY = 4


class _Sparse(PolicyMethod):
    slot = "attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy()


@dataclass(frozen=True)
class SparseTransformer(_Sparse):
    """Sparse Transformer: strided or fixed factors, both in each head (§5.2: merged).

    Attributes:
        pattern: `strided`: the newest tokens and each `stride`-th before; `fixed`: one's own block and the end of each before.
        stride: ℓ, of the order of the square root of the length.
        summary: c, tokens at the end of a block that all later ones see; of `fixed` alone.
    """

    name = "sparse-transformer"
    citation = Citation("Sparse Transformer", year=2019, arxiv="1904.10509")

    pattern: Literal["strided", "fixed"] = "strided"
    stride: int = 32
    summary: int = _SUMMARY

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern == "strided" and self.summary != _SUMMARY:
            raise ValueError(f"summary is a setting of the pattern 'fixed'; 'strided' has none, not {self.summary}")

    def policy(self, seed: int = 0) -> Policy:
        if self.pattern == "strided":
            return patterns.Strided(self.stride)
        return patterns.Fixed(self.stride, self.summary)


@dataclass(frozen=True)
class Longformer(_Sparse):
    """Longformer: a window, with or without gaps, and some tokens at the beginning that all others see.

    Attributes:
        window: Tokens of the window.
        dilation: Distance between them.
        world: First tokens of the text that all others see.
    """

    name = "longformer"
    citation = Citation("Longformer", year=2020, arxiv="2004.05150")

    window: int = 128
    dilation: int = 1
    world: int = 1

    def policy(self, seed: int = 0) -> Policy:
        return patterns.Longformer(self.window, self.world, self.dilation)


@dataclass(frozen=True)
class BigBird(_Sparse):
    """BigBird: blocks of a window, of the beginning, and random ones.

    Attributes:
        block: Tokens of a block.
        window: Newest blocks, one's own included.
        world: First blocks of the text.
        random: Others, drawn for each head and block.
        seed: Of the draw.
    """

    name = "bigbird"
    citation = Citation("BigBird", year=2020, arxiv="2007.14062")
    draws = True

    block: int = 16
    window: int = 3
    world: int = 2
    random: int = 3
    seed: int = 0

    def policy(self, seed: int = 0) -> Policy:
        return patterns.BigBird(self.block, self.window, self.world, self.random, self.seed + seed)


@dataclass(frozen=True)
class BlockBERT(_Sparse):
    """Blockwise BERT: heads differ in which block of the text they see.

    Attributes:
        block: Tokens of a block.
        shifts: Heads take turns in looking 0, 1, … `shifts` - 1 blocks back.
    """

    name = "blockbert"
    citation = Citation("Blockwise BERT", year=2019, arxiv="1911.02972")

    block: int = 128
    shifts: int = 3

    def policy(self, seed: int = 0) -> Policy:
        return patterns.BlockBert(self.block, self.shifts)
