"""The policy `entmax` of the slot `attention`: weights are the α-entmax of the scores, of which some are exactly 0 (adaptively sparse).

With s the scaled products of a query and the keys that it may see, and α of its head between 1 and 2:

    a_j = [(α - 1) s_j - τ]₊^(1 / (α - 1))        τ so that Σ_j a_j = 1

α = 1 is the softmax, α = 2 the sparsemax. τ lies between (α - 1) max s - 1 and (α - 1) max s - n^(1 - α), n the number of keys, and is
found by bisection. The cache holds all tokens: what gets no weight from one token may get some from the next.

Sources: Correia et al., Adaptively sparse transformers, arXiv 1909.00015, §3; Peters et al., arXiv 1905.05702, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slimbench.methods.formats.attention.policy import OperatorPolicy
from slimbench.methods.formats.policy import Scoring, tensors

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.formats.attention.operators.interface import Operator, Rotary


@dataclass(frozen=True)
class Entmax(OperatorPolicy):
    """An α for each head.

    Attributes:
        alphas: `L.alpha` [heads] of each layer, in [1, 2]; a layer without them, or where all of them are 1, has the softmax.
    """

    slot = "attention"
    kind = "entmax"

    alphas: Mapping[str, Tensor] = tensors()

    def __post_init__(self) -> None:
        if not all(bool(((alpha >= 1) & (alpha <= 2)).all()) for alpha in self.alphas.values()):
            raise ValueError("each alpha must lie in [1, 2]")

    @property
    def scoring(self) -> Scoring:
        return "exact"

    def neutral(self) -> Entmax:
        return replace(self, alphas={})

    def exact_keys(self, tokens: int, prompt: int = 0) -> int:
        """All pairs of heads whose α is 1 and none of others, mean over heads."""
        pairs = tokens * (tokens + 1) // 2
        heads = sum(alpha.numel() for alpha in self.alphas.values())
        return pairs * sum(int((alpha == 1).sum()) for alpha in self.alphas.values()) // heads if heads else pairs

    def operator(self, rotary: Rotary, scaling: float, layer: int) -> Operator:
        from slimbench.methods.formats.attention.operators.entmax import EntmaxOperator

        return EntmaxOperator(rotary, scaling, self.alphas.get(f"{layer}.alpha"))
