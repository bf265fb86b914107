"""Policies of the slot `attention` whose tokens choose by queries and keys which earlier ones they see; the cache keeps all of them.

A token sees itself and, with t its position, those at j < t with

    lsh       h_r(k_j) = h_r(q_t) in one of the rounds r, or ⌊t / c⌋ - ⌊j / c⌋ ≤ 1     h_r(x) = argmax [xR_r; -xR_r], R_r [D, b / 2] normal
    routing   c(k_j) = c(q_t), or t - j < w                                           c(x) = argmax_i ⟨x, μ_i⟩, μ of unit length
    sinkhorn  ⌊j / b⌋ = ⌊t / b⌋, or ⌊j / b⌋ one of the m blocks with which block ⌊t / b⌋ is matched

Each head decides for itself; a key is judged once, for all heads of queries that share it.

`lsh`, Reformer (arXiv 2001.04451, §2 and appendix A): P_r are the tokens of the same hash in round r, N_j the number of rounds that have
j. The paper's sum over rounds, each with the weight exp(logsumexp over P_r - logsumexp over their union) and scores ⟨q, k_j⟩ - log N_j, is
the softmax over the union, each token counted once: that is what is computed. Hashes are of rotated vectors, since the angle between these
is what the softmax sees; the paper's model has no rotations. Not here: one projection for queries and keys, reversible layers, and the
sorting into chunks, which cuts large buckets off. The own chunk of c tokens and the one before stand for the authors' layers of local
attention.

`routing`, Routing Transformer (arXiv 2003.05997, §4.1): the centroids of a head are those of its keys alone, since queries of a model that
was not trained with them lie elsewhere; of unit vectors, where the paper takes a layer norm, and not rotated. All earlier tokens of a
centroid are seen, not the w nearest to it: these would be chosen among later ones too. The newest w stand for the paper's heads of local
attention.

`sinkhorn`, Sparse Sinkhorn Attention (arXiv 2002.11296, §3): with means over the tokens of a block, not rotated, for blocks j < i

    R_ij = ⟨mean of q in block i - 1, mean of k in block j⟩ / (√d τ), then n times
    R_ij ← R_ij - log Σ_{l < i} exp R_il        R_ij ← R_ij - log Σ_{j < l ≤ i} exp R_lj + log Σ_{j < l ≤ i} 1 / l

and block i is matched with those of the m largest R_ij, known when it begins. Rows sum to 1, columns of the blocks so far to what they have
where each block asks all earlier ones alike: columns that sum to 1, as in the paper's square, have one solution in a triangle, in which
each block sees the one before. The paper learns a network for R, adds Gumbel noise while it learns, and mixes blocks by exp R; here the
chosen ones are read as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slimbench.methods.formats.attention.policy import ALL, OperatorPolicy, positive
from slimbench.methods.formats.policy import Scoring, tensors

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.formats.attention.operators.interface import Operator, Rotary

_CODES = 1 << 15
"""Values that two bytes tell apart."""


class Content(OperatorPolicy):
    """What a token sees, by queries and keys."""

    slot = "attention"

    @property
    def scoring(self) -> Scoring:
        return "exact"


@dataclass(frozen=True)
class Lsh(Content):
    """Tokens of the same hash.

    Attributes:
        rounds: Hashes of a vector.
        buckets: b, values of a hash.
        local: c, tokens of a chunk, of which one's own and the one before are seen; 0: none.
        seed: Of R.
    """

    kind = "lsh"

    rounds: int
    buckets: int
    local: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        positive(rounds=self.rounds)
        if self.buckets % 2 or not 2 <= self.buckets <= _CODES:
            raise ValueError(f"buckets must be even, at least 2 and at most {_CODES}, not {self.buckets}")
        if self.local < 0:
            raise ValueError(f"local must not be negative, not {self.local}")

    def neutral(self) -> Lsh:
        return replace(self, local=ALL)

    def exact_keys(self, tokens: int, prompt: int = 0) -> int:
        """Pairs of a token and one of its chunk or the one before; hashes show it further ones."""
        if not self.local:
            return tokens
        whole, rest = divmod(tokens, self.local)
        inside = whole * self.local * (self.local + 1) // 2 + rest * (rest + 1) // 2
        return inside + max(0, whole - 1) * self.local**2 + (rest * self.local if whole else 0)

    def operator(self, rotary: Rotary, scaling: float, layer: int) -> Operator:
        from slimbench.methods.formats.attention.operators.content import LshOperator

        return LshOperator(rotary, scaling, (self.rounds, self.buckets), self.local, (self.seed, layer))


@dataclass(frozen=True)
class Routing(Content):
    """Tokens of the same centroid, and the newest.

    Attributes:
        window: w, the token itself among them.
        means: μ [key-value heads, centroids, D] of each layer, by its number.
    """

    kind = "routing"

    window: int
    means: Mapping[str, Tensor] = tensors()

    def __post_init__(self) -> None:
        positive(window=self.window)

    def neutral(self) -> Routing:
        return replace(self, window=ALL)

    def exact_keys(self, tokens: int, prompt: int = 0) -> int:
        """Pairs of a token and one of its window; centroids show it further ones."""
        reach = min(tokens, self.window)
        return reach * (reach + 1) // 2 + (tokens - reach) * self.window

    def operator(self, rotary: Rotary, scaling: float, layer: int) -> Operator:
        from slimbench.methods.formats.attention.operators.content import RoutingOperator

        return RoutingOperator(rotary, scaling, self.means.get(str(layer)), self.window)


@dataclass(frozen=True)
class Sinkhorn(Content):
    """One's own block and some that it is matched with.

    Attributes:
        block: b, tokens of a block.
        blocks: m.
        iterations: n.
        temperature: τ.
    """

    kind = "sinkhorn"

    block: int
    blocks: int
    iterations: int = 7
    temperature: float = 0.75

    def __post_init__(self) -> None:
        positive(block=self.block, blocks=self.blocks, iterations=self.iterations)
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")

    @property
    def reads_queries(self) -> bool:
        """Blocks are matched by the mean of their queries."""
        return True

    def neutral(self) -> Sinkhorn:
        return replace(self, block=ALL)

    def exact_keys(self, tokens: int, prompt: int = 0) -> int:
        """Pairs of a token and one that it sees: as many whatever the blocks are."""
        whole, rest = divmod(tokens, self.block)
        few = min(whole, self.blocks)
        matched = few * (few - 1) // 2 + (whole - few) * self.blocks
        inside = whole * self.block * (self.block + 1) // 2 + rest * (rest + 1) // 2
        return inside + matched * self.block**2 + rest * few * self.block

    def operator(self, rotary: Rotary, scaling: float, layer: int) -> Operator:
        from slimbench.methods.formats.attention.operators.content import SinkhornOperator

        return SinkhornOperator(rotary, scaling, self.block, self.blocks, self.iterations, self.temperature)
