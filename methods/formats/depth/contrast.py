"""The policy `contrast` of the slot `depth`: the next token is one of which the end of the model is surer than an early block (DoLa).

With p_N the distribution that the model gives, and p_j the softmax of its head on the state behind j blocks, not normed:

    M  = the candidate j of the largest JSD(p_N ‖ p_j)        JSD(p ‖ q) = ½ KL(p ‖ m) + ½ KL(q ‖ m),  m = ½ (p + q)
    F  = log p_N(x) - log p_M(x)    where p_N(x) ≥ α max p_N
         -∞                         else

and F stands in place of the logits. Tokens outside have no probability, so that no text is scored. Everything runs, and the head once more
for each candidate. Without candidates the logits are left alone. Each token has its own M.

Source: Chuang et al., DoLa, arXiv 2309.03883, §2; voidism/DoLa, whose divergences have their arguments the other way round and are a
mean over the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from slimbench.methods.base import ModelShape, Unsupported
from slimbench.methods.formats.policy import Policy, Scoring


@dataclass(frozen=True)
class Contrast(Policy):
    """Logits against those of an early block.

    Attributes:
        candidates: Blocks that have run at each, in ascending order; 0: the embeddings.
        floor: α.
    """

    slot = "depth"
    kind = "contrast"

    candidates: tuple[int, ...]
    floor: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "candidates", tuple(self.candidates))
        if sorted(set(self.candidates)) != list(self.candidates) or min(self.candidates, default=0) < 0:
            raise ValueError(f"candidates must be numbers of blocks in ascending order, not {list(self.candidates)}")
        if not 0 < self.floor <= 1:
            raise ValueError(f"floor must lie in (0, 1], not {self.floor}")

    @property
    def scoring(self) -> Scoring:
        return "none" if self.candidates else "exact"

    def neutral(self) -> Contrast:
        return replace(self, candidates=())

    def check(self, shape: ModelShape) -> None:
        if max(self.candidates, default=0) >= shape.num_layers:
            raise Unsupported(f"candidates must lie before the last of {shape.num_layers} blocks, not behind {self.candidates[-1]}")

    def install(self, model: Any) -> None:
        """Raises `Unsupported` if the model changes what its head gives."""
        from slimbench.methods.formats.depth.contrasted import install

        install(model, self.candidates, self.floor)
