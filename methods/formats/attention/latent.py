"""The policy `latent` of the slot `cache`: of all heads' keys and values together a vector of few numbers is kept (latent attention, MLA).

Of each head of keys only some pairs of channels are rotated by position, the others stand as they are, in queries too. With y the values of
all heads and the channels of their keys that are not rotated,

    kept         c = C y  of r numbers, and the rotated channels of the keys
    read         ŷ = U c

so that a token takes r + heads · 2 · pairs numbers in place of 2 · heads · d. With all pairs rotated and r as long as y it is the base.

Sources: DeepSeek-V2 (arXiv 2405.04434), §2.1; MHA2MLA (arXiv 2502.14837), §3, for models that were trained without it: which pairs, and one
joint decomposition of what makes keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slimbench.methods.formats.attention.policy import OperatorPolicy, positive
from slimbench.methods.formats.policy import Scoring, tensors

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.formats.attention.operators.interface import Operator, Rotary


@dataclass(frozen=True)
class Latent(OperatorPolicy):
    """A joint latent vector of keys and values.

    Attributes:
        rank: r.
        pairs: Pairs of channels of each head of keys that are rotated.
        parts: `L.pairs` [heads, pairs], int64, ascending: pair i has the channels i and i + d / 2; `L.down` C [r, n] and `L.up` U [n, r].
            None of a layer: it is as it was.
    """

    slot = "cache"
    kind = "latent"
    trainable = True

    rank: int
    pairs: int
    parts: Mapping[str, Tensor] = tensors()

    def __post_init__(self) -> None:
        positive(rank=self.rank)
        if self.pairs < 0:
            raise ValueError(f"pairs must not be negative, not {self.pairs}")

    @property
    def scoring(self) -> Scoring:
        return "exact"

    def neutral(self) -> Latent:
        return replace(self, parts={})

    def exact_keys(self, tokens: int, prompt: int = 0) -> int:
        """No key is as it was."""
        return 0 if self.parts else tokens * (tokens + 1) // 2

    def operator(self, rotary: Rotary, scaling: float, layer: int) -> Operator:
        from slimbench.methods.formats.attention.operators.latent import LatentOperator

        own = {name.partition(".")[2]: tensor for name, tensor in self.parts.items() if name.partition(".")[0] == str(layer)}
        return LatentOperator(rotary, scaling, own)
