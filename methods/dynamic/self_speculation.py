"""Self-speculation: the first blocks guess, the whole model checks and takes over what they computed (LayerSkip, arXiv 2404.16710, §4.3).

LayerSkip also trains a model so that its first blocks guess well; what that adds is measured against a model that was not trained so.
"""

from __future__ import annotations

from dataclasses import dataclass

from slimbench.methods.base import Citation
from slimbench.methods.core.policies import PolicyMethod
from slimbench.methods.formats.draft.policy import Exit
from slimbench.methods.formats.policy import Policy


@dataclass(frozen=True)
class SelfSpeculation(PolicyMethod):
    """Guesses of the first blocks (`methods.formats.draft.policy`).

    Attributes:
        blocks: Blocks that guess.
        tokens: Guesses of a pass.
    """

    name = "self-speculation"
    slot = "draft"
    citation = Citation("LayerSkip: self-speculative decoding", year=2024, arxiv="2404.16710")

    blocks: int = 10
    tokens: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy()

    def policy(self, seed: int = 0) -> Policy:
        return Exit(self.tokens, self.blocks)
