"""Attention to summaries of earlier parts of a text (`methods.formats.attention.pooled`), put on a model that was trained without them.

Combiner and BP-Transformer are put on as they are. The projections of Linformer begin as means of neighbours and are fitted in each layer
to the attention as it was (`methods.core.learning.transfer`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Citation
from slimbench.methods.core.learning.transfer import AttentionTransfer, Named
from slimbench.methods.core.policies import PolicyMethod
from slimbench.methods.formats.attention.policy import positive
from slimbench.methods.formats.attention.pooled import Pooled
from slimbench.methods.formats.policy import Policy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Combiner(PolicyMethod):
    """Combiner-Fixed: one's own block, and an expectation over each block before.

    Attributes:
        block: Tokens of a block, of the order of the square root of the length.
    """

    name = "combiner"
    slot = "attention"
    citation = Citation("Combiner", year=2021, arxiv="2107.05768")

    block: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy()

    def policy(self, seed: int = 0) -> Policy:
        return Pooled("combiner", self.block)


@dataclass(frozen=True)
class BPTransformer(PolicyMethod):
    """BP-Transformer: spans of tokens that are the longer the farther back they are.

    Attributes:
        spans: k, how many there are of each length.
    """

    name = "bp-transformer"
    slot = "attention"
    citation = Citation("BP-Transformer", year=2019, arxiv="1911.04070")

    spans: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(spans=self.spans)

    def policy(self, seed: int = 0) -> Policy:
        return Pooled("spans", self.spans)


@dataclass(frozen=True)
class Linformer(AttentionTransfer):
    """Linformer, block by block: a few projected keys and values in place of those of a whole block.

    Attributes:
        block: Tokens of a block.
        summaries: r, what is left of it.
    """

    name = "linformer"
    citation = Citation("Linformer", year=2020, arxiv="2006.04768")
    brings = "weights"

    block: int = 32
    summaries: int = 8
    learning_rate: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length <= self.block:
            raise ValueError(f"length must exceed the block of {self.block}, behind which alone there are summaries, not {self.length}")

    def policy(self) -> Pooled:
        return Pooled("projection", self.block, self.summaries)

    def begin(self, model: Any, ids: Tensor) -> tuple[Named, Named]:
        """Projections of each layer that average neighbours."""
        import torch

        from slimbench.methods.formats.attention.operators.interface import attentions

        stretch = self.block // self.summaries
        mean = (torch.eye(self.summaries) / stretch).repeat_interleave(stretch, 1).to(model.device)
        return {}, {f"{part.layer_idx}.{which}": mean.clone() for part in attentions(model) for which in ("keys", "values")}
