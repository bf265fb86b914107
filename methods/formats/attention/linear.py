"""The policy `linear` of the slot `attention`: earlier tokens are a state of constant size, the newest may be attended to exactly.

With features φ of rotated queries and keys, the window w, and weights a:

    newest, t - w < j ≤ t      a_tj = σ(g) exp(⟨q_t, k_j⟩ / √d - m_t)       m_t the largest of these exponents
    older,  j ≤ t - w          a_tj = ⟨φ(q_t), φ(k_j)⟩
    y_t = Σ_j a_tj v_j / Σ_j a_tj

Of the older ones only S = Σ φ(k_j) v_jᵀ and z = Σ φ(k_j) are kept, in float32: for each head of keys, or of queries where these have
learned features of their own. Features of x, by `feature`:

    elu        elu(x) + 1                                                Linear Transformer (arXiv 2006.16236), eq. 7
    relu       relu(W x + b), W and b learned for each head              T2R (arXiv 2103.13076)
    hedgehog   [softmax(W x), softmax(-W x)], W learned for each head    Hedgehog (arXiv 2402.04347), LoLCATs (arXiv 2410.10254)
    positive   exp(ωᵀx' - ‖x'‖² / 2) / √m, rows of ω orthogonal          Performer, FAVOR+ (arXiv 2009.14794), lemma 1
    fourier    exp(‖x'‖² / 2) [cos ωᵀx', sin ωᵀx'] / √m, ω independent   Rahimi and Recht, Random features, NIPS 2007, for exp(⟨x, y⟩)
    efficient  queries: softmax over channels; keys: softmax over the tokens so far of each channel     arXiv 1812.01243, causal

x' = x / d^¼, so that ⟨φ(q), φ(k)⟩ is exp(⟨q, k⟩ / √d) on average for `positive` and `fourier`. To each feature of `positive` 10⁻⁶ of the
largest one of its vector are added, so that no weights of a query are all 0. The authors' program (google-research, `performer`) adds 10⁻⁶
as such, after it has taken the largest exponent of all keys from each, later ones too: features of long keys are then all alike. Where a
window stands beside learned features, the largest exponent is taken from its weights alone, as in LoLCATs. A window over everything is the
base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from slimbench.methods.formats.attention.policy import ALL, LEARNED, OperatorPolicy, positive
from slimbench.methods.formats.policy import Scoring, tensors

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.formats.attention.operators.interface import Operator, Rotary

Feature = Literal["elu", "relu", "hedgehog", "positive", "fourier", "efficient"]
DRAWN = ("positive", "fourier")


@dataclass(frozen=True)
class Linear(OperatorPolicy):
    """Attention through a state.

    Attributes:
        feature: φ.
        window: w, newest tokens, the token itself among them; 0: none.
        features: m, of `positive` and `fourier`.
        seed: Of their draw.
        maps: Of learned features: W, `L.query` and `L.key` [heads, d, d] of each layer, of `relu` also b, `L.query_bias` and `L.key_bias`
            [heads, d], and with a window `L.gate` [heads].
    """

    slot = "attention"
    kind = "linear"
    trainable = True

    feature: Feature
    window: int = 0
    features: int = 128
    seed: int = 0
    maps: Mapping[str, Tensor] = tensors()

    def __post_init__(self) -> None:
        positive(features=self.features)
        if self.window < 0:
            raise ValueError(f"window must not be negative, not {self.window}")
        if 0 < self.window < ALL and self.feature not in LEARNED:
            raise ValueError(f"a window stands beside learned features, {' or '.join(LEARNED)}, not beside '{self.feature}'")

    @property
    def scoring(self) -> Scoring:
        return "exact"

    def neutral(self) -> Linear:
        return replace(self, window=ALL)

    def exact_keys(self, tokens: int, prompt: int = 0) -> int:
        """Pairs of a token and one of its window."""
        reach = min(tokens, self.window)
        return reach * (reach + 1) // 2 + (tokens - reach) * self.window

    def operator(self, rotary: Rotary, scaling: float, layer: int) -> Operator:
        from slimbench.methods.formats.attention.operators.linear import LinearOperator

        own = {name.partition(".")[2]: tensor for name, tensor in self.maps.items() if name.partition(".")[0] == str(layer)}
        return LinearOperator(rotary, scaling, self.feature, self.window, (self.features, self.seed * 1_000_003 + layer), own)
