"""The policy `hyper` of the slot `attention`: of a long prompt most of the attention is estimated (HyperAttention).

A prompt of n tokens is halved, ⌈n / 2⌉ tokens and the rest, until a part has fewer than 2s. Within such a part attention is exact. Later
halves see the earlier ones by an estimate; what a token sees in all of them is one softmax, joined by the logarithms of sums. The
estimate of how queries of one half see the h keys of the other:

    1. both are sorted by the place of their hash bits, sign ⟨x, ω_i⟩ for p directions ω, in an order in which neighbours differ in one bit
    2. the sorted keys are cut into blocks of b, the sorted queries into as many; a query attends to the keys of the block at its place
    3. m keys are drawn, uniformly and with replacement; those that are not in the query's block count h / m times

Decode steps, and whatever follows the first pass, attend to the whole cache, exactly: texts are scored behind a prompt. The place of a
query among the sorted ones depends on the other queries of its half, later ones too; no later key or value enters. So outputs within a
prompt are not quite causal, here as in the paper; what follows a prompt is.

Directions depend on seed and layer, draws also on the place of the part, and are the same for all texts of a batch.

Source: Han et al., HyperAttention, arXiv 2310.05869, algorithms 1, 3 and 4 with uniform samples; insuhan/hyper-attn, `models/attention`.
There the table that orders hashes holds the Gray code of each instead of its place among Gray codes, so that for p > 2 not all neighbours
differ in one bit; a length that is no multiple of the blocks is filled up with zeros, which get weights, here none; and the path without
flash attention lets samples count that are in the query's block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slimbench.methods.formats.attention.policy import ALL, OperatorPolicy, positive
from slimbench.methods.formats.policy import Scoring

if TYPE_CHECKING:
    from slimbench.methods.formats.attention.operators.interface import Operator, Rotary

_MOST_BITS = 30


@dataclass(frozen=True)
class Hyper(OperatorPolicy):
    """An estimate for prompts.

    Attributes:
        block: b, keys of a block.
        samples: m; 0: blocks alone.
        projections: p, bits of a hash.
        shortest: s, tokens of a half from which on it is estimated how it sees the other.
        seed: Of directions and draws.
    """

    slot = "attention"
    kind = "hyper"

    block: int
    samples: int
    projections: int
    shortest: int
    seed: int = 0

    def __post_init__(self) -> None:
        positive(block=self.block, shortest=self.shortest)
        if self.samples < 0 or not 1 <= self.projections <= _MOST_BITS:
            raise ValueError(
                f"samples must not be negative and projections from 1 to {_MOST_BITS}, not {self.samples} and {self.projections}"
            )

    @property
    def scoring(self) -> Scoring:
        return "suffix"

    @property
    def reads_queries(self) -> bool:
        """The place of a query depends on the others of its half."""
        return True

    def neutral(self) -> Hyper:
        return replace(self, shortest=ALL)

    def exact_keys(self, tokens: int, prompt: int = 0) -> int:
        """Pairs of a token and one that it would see exactly if a prompt ended with it; all, if the prompt is short."""
        if 0 < prompt < 2 * self.shortest:
            return tokens * (tokens + 1) // 2
        short = min(tokens, 2 * self.shortest - 1)
        return short * (short + 1) // 2 + sum(self._exact(length) for length in range(short + 1, tokens + 1))

    def _exact(self, length: int) -> int:
        """Tokens of the last part of a prompt."""
        while length >= 2 * self.shortest:
            length //= 2
        return length

    def operator(self, rotary: Rotary, scaling: float, layer: int) -> Operator:
        from slimbench.methods.formats.attention.operators.hyper import HyperOperator

        return HyperOperator(rotary, scaling, (self.block, self.samples), self.projections, self.shortest, (self.seed, layer))
