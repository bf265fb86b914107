"""The policy `window` of the slot `cache`: of a text the first tokens, the sinks, and the newest ones are kept (StreamingLLM).

After every token t the cache holds the keys and values of the first S tokens and of the last W. The next token sees these and itself:

    j < S  or  t - j ≤ W            positions count in the cache: ⟨R(slot of t) q, R(slot of j) k⟩, slot of t = min(t, S + W)

Two tokens of the window are as far apart in the cache as in the text, so their keys are rotated once, by the position in the text. The
sinks alone come nearer with every token that is dropped: their keys are kept as they are and rotated anew. In whatever pieces a text goes
through, the same numbers come out.

Source: Xiao et al., Efficient streaming language models with attention sinks, arXiv 2309.17453, §3.2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slimbench.methods.formats.attention.policy import ALL, OperatorPolicy
from slimbench.methods.formats.policy import Scoring

if TYPE_CHECKING:
    from slimbench.methods.formats.attention.operators.interface import Operator, Rotary


@dataclass(frozen=True)
class Window(OperatorPolicy):
    """The first tokens and the newest.

    Attributes:
        sinks: S.
        recent: W.
    """

    slot = "cache"
    kind = "window"
    trainable = True

    sinks: int
    recent: int

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.recent < 1:
            raise ValueError(f"sinks must not be negative and recent at least 1, not {self.sinks} and {self.recent}")

    @property
    def scoring(self) -> Scoring:
        return "exact"

    @property
    def reach(self) -> int:
        """Positions count in the cache."""
        return self.sinks + self.recent + 1

    def neutral(self) -> Window:
        return replace(self, recent=ALL)

    def exact_keys(self, tokens: int, prompt: int = 0) -> int:
        """Pairs of a token and one that it sees at the distance that both have in the text: those of the window."""
        reach, full = self.sinks + self.recent + 1, tokens * (tokens + 1) // 2
        if tokens <= reach:
            return full
        return reach * (reach + 1) // 2 + (tokens - reach) * (self.recent + 1)

    def operator(self, rotary: Rotary, scaling: float, layer: int) -> Operator:
        from slimbench.methods.formats.attention.operators.window import WindowOperator

        return WindowOperator(rotary, scaling, self.sinks, self.recent)
