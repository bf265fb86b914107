"""The policy `reduction` of the slot `depth`: the tokens of a prompt that get least attention end in an early block (TR-BERT).

With A the causal weights of the attention of block l, for a prompt of T tokens at the positions 0 … T - 1 and H heads

    I_j = Σ_h Σ_{i ≥ j} A_h(i, j) / (H (T - j))        the mean over heads and over the queries that see j

the last token and the others of largest I, ⌊ρ T + ½⌋ in all and at least one, go on through the blocks behind l. The rest run none of
these and have neither keys nor values there, so that the caches of later blocks hold fewer tokens. Positions are those of the text. Each
text of a batch has its own tokens. What comes after a prompt runs all blocks, and sees in each what that block holds. At ρ = 1 all tokens
go on, and the base is reproduced.

Later tokens of a prompt decide which earlier ones go on. So a text is scored behind a prompt alone (`scoring` is `suffix`), whose last
token gives the first prediction; what a head makes of tokens that ended early is nobody's prediction.

In TR-BERT an encoder asks in two blocks a small network, π(h) = σ(w₂ GELU(W₁ h)), which was trained by reinforcement; tokens go on where
π is at least ½, so their number comes out of the text, and the first token always does. Before that, the network learns to imitate a
ranking by importance. Attention stands here in its place, as in an experiment of the authors' program, which adds it up over heads and
queries; a decoder's first tokens are seen by more queries, so here it is a mean.

Source: Ye et al., TR-BERT, arXiv 2105.11618; thunlp/TR-BERT, `modeling_autobert.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from slimbench.methods.base import ModelShape, Unsupported
from slimbench.methods.formats.policy import Policy, Scoring


@dataclass(frozen=True)
class Reduction(Policy):
    """Tokens of a prompt that end early.

    Attributes:
        layer: Blocks that all tokens run; in the last of them they are judged.
        keep: ρ, share of a prompt's tokens that run the others.
    """

    slot = "depth"
    kind = "reduction"
    attends = True
    shortens = True

    layer: int
    keep: float

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise ValueError(f"layer must be at least 1, not {self.layer}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must lie in (0, 1], not {self.keep}")

    @property
    def scoring(self) -> Scoring:
        return "suffix"

    def count(self, tokens: int) -> int:
        """Tokens of a prompt of so many that go on."""
        return max(1, math.floor(self.keep * tokens + 0.5))

    def runs(self, blocks: int) -> tuple[int, int]:
        """The least and the most blocks, of so many, that a token runs whatever the text."""
        return self.layer if self.keep < 1 else blocks, blocks

    def neutral(self) -> Reduction:
        return replace(self, keep=1.0)

    def check(self, shape: ModelShape) -> None:
        if self.layer >= shape.num_layers:
            raise Unsupported(f"layer must lie before the last of {shape.num_layers} blocks, not be block {self.layer}")

    def install(self, model: Any) -> None:
        """Raises `Unsupported` if the blocks of the model are not built like those of Llama, or the one that judges has no attention."""
        from slimbench.methods.formats.depth.reduced import Reduced

        Reduced(model, self.layer, self.count).install("reduced")
