"""The policy `vq` of the slot `attention`: tokens see older ones through a code book of keys (Transformer-VQ).

The newest w tokens of t, itself included, are attended to exactly. The key of an older one, before it is rotated, counts as the nearest c_s
of the S codes of its head; of all older ones with the same code only their number n_s and the mean v̄_s of their values are kept:

    newest, t - w < j ≤ t      a_tj = exp⟨R(t) q_t, R(j) k_j⟩ / √d
    code s                     a_ts = n_s exp⟨R(w) q_t, R(0) c_s⟩ / √d
    y_t = (Σ_j a_tj v_j + Σ_s a_ts v̄_s) / (Σ_j a_tj + Σ_s a_ts)

Keys share codes over positions only as long as they are not rotated. So each code stands at one distance, w tokens before the query: how
far old tokens are from the query and from each other, and in which order they came, is lost.

What differs from the paper: there keys of all tokens are codes, the newest too, whose scores alone carry a term for the distance; the code
book learns with the model, by a loss that draws keys to their codes; what is exact ends at blocks, the token's own and the one before. Here
the keys of the newest are as they are, codes are the means of a clustering of a pretrained model's keys, and the window moves by token.

Source: Lingle, Transformer-VQ, arXiv 2309.16354, §3; transformer-vq/transformer_vq, `nn/attn.py`.
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


@dataclass(frozen=True)
class VQ(OperatorPolicy):
    """Codes in place of old keys.

    Attributes:
        exact: w, newest tokens, the token itself among them.
        books: `L.codes` [G, S, D] of each layer, of keys that are not rotated.
    """

    slot = "attention"
    kind = "vq"

    exact: int
    books: Mapping[str, Tensor] = tensors()

    def __post_init__(self) -> None:
        positive(exact=self.exact)

    @property
    def scoring(self) -> Scoring:
        return "exact"

    def neutral(self) -> VQ:
        return replace(self, exact=ALL)

    def exact_keys(self, tokens: int, prompt: int = 0) -> int:
        """Pairs of a token and one of its newest."""
        reach = min(tokens, self.exact)
        return reach * (reach + 1) // 2 + (tokens - reach) * self.exact

    def operator(self, rotary: Rotary, scaling: float, layer: int) -> Operator:
        from slimbench.methods.formats.attention.operators.vq import VQOperator

        return VQOperator(rotary, scaling, self.exact, self.books.get(f"{layer}.codes"))
