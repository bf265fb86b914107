"""The policy `pooled` of the slot `attention`: of earlier parts of a text a token sees summaries.

A token t attends to the tokens j ≤ t of its own block of b, and in the same softmax to summaries s of the whole blocks before it:

    a_tj = exp⟨R(t) q_t, R(j) k_j⟩ / √d        a_ts = exp⟨R(t) q_t, R(m_s) k̃_s⟩ / √d
    y_t = (Σ_j a_tj v_j + Σ_s a_ts ṽ_s) / (Σ_j a_tj + Σ_s a_ts)

k̃ is made of keys that are not rotated, and stands at one position m_s, the middle of the tokens that it is for. By `pooling`:

    projection  r summaries for each block: K̃ = E K and Ṽ = F V, E and F [r, b] of the layer; the i-th stands in the middle of the
                i-th of r stretches. Without tensors E and F average these stretches. Linformer (arXiv 2006.04768, eq. 7)
    combiner    one for each block β: k̃ = mean k_j, q̃ = mean q_j, ṽ = Σ_j p(j | β) v_j, p(j | β) ∝ exp⟨R(m) q̃, R(j) k_j⟩ / √d.
                Combiner-Fixed (arXiv 2107.05768, eq. 7, 9, 10)
    spans       no blocks: t and the k tokens before it singly, then k spans of 2 tokens, k of 4, …, back to the beginning. A span of n is
                aligned: its first position is a multiple of n; where none ends at the one before, the first of a length is one of half that
                length. k̃ and ṽ are means over the span. BP-Transformer (arXiv 1911.04070, §3;
                yzh119/BPT, `builder.pyx`)

What differs from the papers: Linformer projects a whole text of one length, both ways; here each block, so that it is causal and a text has
any length. E and F are shared by the heads of a layer, as in its headwise sharing. Combiner pools by the largest number of each channel,
which a rotation would mix with others, or by a trained network, and may average several partitions; here it is the mean, and one partition.
The spans of BP-Transformer are nodes that each layer updates by an attention of their own, with positions learned for each length; here
they are means of what the layer has of their tokens.

What is kept of old tokens: r keys and values for each block; one key for each head of keys and one value for each head of queries for
each block of `combiner`, and one sum of queries; at most 2 k + 1 keys and values for each length of `spans`, thus of the order of k log T.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from slimbench.methods.formats.attention.policy import ALL, OperatorPolicy, positive
from slimbench.methods.formats.policy import Scoring, tensors

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.formats.attention.operators.interface import Operator, Rotary

Pooling = Literal["projection", "combiner", "spans"]


@dataclass(frozen=True)
class Pooled(OperatorPolicy):
    """Summaries of earlier tokens.

    Attributes:
        pooling: How they are made.
        block: b; with `spans` k, spans of each length.
        summaries: r, of each block; with `projection` alone.
        weights: Of `projection`: `L.keys` and `L.values` [r, b] of each layer, E and F.
    """

    slot = "attention"
    kind = "pooled"
    trainable = True

    pooling: Pooling
    block: int
    summaries: int = 1
    weights: Mapping[str, Tensor] = tensors()

    def __post_init__(self) -> None:
        positive(block=self.block, summaries=self.summaries)
        if self.pooling != "projection" and self.summaries > 1:
            raise ValueError(f"summaries must be 1 with '{self.pooling}', not {self.summaries}")
        if self.block < ALL and self.block % self.summaries:
            raise ValueError(f"block must be a multiple of the {self.summaries} summaries, not {self.block}")

    @property
    def scoring(self) -> Scoring:
        return "exact"

    @property
    def reads_queries(self) -> bool:
        """Combiner pools those of a block."""
        return self.pooling == "combiner"

    def neutral(self) -> Pooled:
        return replace(self, block=ALL)

    def exact_keys(self, tokens: int, prompt: int = 0) -> int:
        """Pairs of a token and one that it sees singly."""
        if self.pooling == "spans":
            reach = min(tokens, self.block + 1)
            return reach * (reach + 1) // 2 + (tokens - reach) * (self.block + 1) + max(0, tokens - self.block) // 2
        whole, rest = divmod(tokens, self.block)
        return whole * self.block * (self.block + 1) // 2 + rest * (rest + 1) // 2

    def operator(self, rotary: Rotary, scaling: float, layer: int) -> Operator:
        from slimbench.methods.formats.attention.operators.pooled import BlockOperator, SpanOperator

        if self.pooling == "spans":
            return SpanOperator(rotary, scaling, self.block)
        own = {name.partition(".")[2]: tensor for name, tensor in self.weights.items() if name.partition(".")[0] == str(layer)}
        return BlockOperator(rotary, scaling, self.pooling, (self.block, self.summaries), own)
