"""The policy `span` of the slot `attention`: each head sees as far back as it learned to (adaptive attention span).

With z the span of a head, R the length of the ramp at its end, s the scaled products of queries and keys, and x = t - j ≥ 0:

    m(x) = min(max((R + z - x) / R, 0), 1)
    a_tj = m(t - j) exp(s_tj) / Σ_i m(t - i) exp(s_ti)

Nothing is seen from x = z + R on. So before a token a layer keeps the newest ⌈z + R⌉ - 1 tokens, z the longest of its heads: those of one
layer keep equally many, so that tensors stay rectangular; layers differ. Keys are rotated once, by the position in the text.

Source: Sukhbaatar et al., Adaptive attention span in transformers, arXiv 1905.07799, §2.2; facebookresearch/adaptive-span, which adds 1e-8
to the sum, as its softmax is taken before the mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slimbench.methods.formats.attention.policy import OperatorPolicy, positive
from slimbench.methods.formats.policy import Scoring, tensors

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.formats.attention.operators.interface import Operator, Rotary


@dataclass(frozen=True)
class Span(OperatorPolicy):
    """A span for each head.

    Attributes:
        ramp: R.
        spans: `L.span` z [heads] of each layer, not negative; a layer without them sees everything.
    """

    slot = "attention"
    kind = "span"
    trainable = True

    ramp: int
    spans: Mapping[str, Tensor] = tensors()

    def __post_init__(self) -> None:
        positive(ramp=self.ramp)
        if any(bool((span < 0).any()) for span in self.spans.values()):
            raise ValueError("spans must not be negative")

    @property
    def scoring(self) -> Scoring:
        return "exact"

    def neutral(self) -> Span:
        return replace(self, spans={})

    def exact_keys(self, tokens: int, prompt: int = 0) -> int:
        """Pairs of a token and one before the ramp, mean over heads."""
        reaches = [min(tokens, math.floor(z) + 1) for span in self.spans.values() for z in span.tolist()] or [tokens]
        return sum(reach * (reach + 1) // 2 + (tokens - reach) * reach for reach in reaches) // len(reaches)

    def operator(self, rotary: Rotary, scaling: float, layer: int) -> Operator:
        from slimbench.methods.formats.attention.operators.span import SpanOperator

        return SpanOperator(rotary, scaling, self.spans.get(f"{layer}.span"), self.ramp)
