"""The policy `router` of the slot `depth`: a token runs the blocks whose router lets it in, and keeps its state at the others (SkipLayer).

With h the state of a token before a block, w and b of the router of the block:

    σ(⟨w, h⟩ + b) > θ    h ← block(h)
    else                 h ← h

Keys and values of the block are made for every token, from its state as it is, so that those that run see all before them. At θ = -1 all
tokens run everywhere, and the base is reproduced. Blocks may be skipped and later ones run, where an exit ends a token's way.

One text at a time. A text gives the same in any pieces, since a token's way depends on earlier tokens alone.

Source: Zeng et al., Learning to skip for language modeling, arXiv 2311.15436.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import ModelShape, Unsupported
from slimbench.methods.formats.policy import Policy, Scoring, tensors

if TYPE_CHECKING:
    from torch import Tensor

ALWAYS = -1.0
"""A threshold that every token passes."""


@dataclass(frozen=True)
class Router(Policy):
    """Routers before some blocks.

    Attributes:
        threshold: θ.
        routers: `L.weight` w [hidden] and `L.bias` b [1] of block L, counted from 0; all tokens run a block without them.
    """

    slot = "depth"
    kind = "router"
    attends = True

    threshold: float
    routers: Mapping[str, Tensor] = tensors()

    def __post_init__(self) -> None:
        if not self.threshold < 1:
            raise ValueError(f"threshold must be below 1, or no token runs any block, not {self.threshold}")

    @property
    def scoring(self) -> Scoring:
        return "exact"

    @property
    def max_batch(self) -> int:
        return 1

    def runs(self, blocks: int) -> tuple[int, int]:
        """The least and the most blocks, of so many, that a token runs whatever the text: what a router with w = 0 says is known."""
        open_ = [self._always(block) for block in range(blocks)]
        return sum(known is True for known in open_), sum(known is not False for known in open_)

    def _always(self, block: int) -> bool | None:
        """Whether every token runs a block, or none does; None where it comes out of the text."""
        weight, bias = (self.routers.get(f"{block}.{part}") for part in ("weight", "bias"))
        if weight is None or bias is None or self.threshold < 0:
            return True
        return None if weight.any() else float(bias.float().sigmoid()) > self.threshold

    def neutral(self) -> Router:
        return replace(self, threshold=ALWAYS)

    def check(self, shape: ModelShape) -> None:
        last = max((int(name.partition(".")[0]) for name in self.routers), default=0)
        if last >= shape.num_layers:
            raise Unsupported(f"there is no block {last} for a router among {shape.num_layers}, counted from 0")

    def install(self, model: Any) -> None:
        """Raises `Unsupported` if the blocks of the model are not built like those of Llama."""
        from slimbench.methods.formats.depth.routed import Routed

        Routed(model, self.threshold, self.routers).install("routed")
