"""Token reduction: of a prompt, the tokens that get little attention run the first blocks alone (`methods.formats.depth.reduction`).

In place of the network that TR-BERT trains by reinforcement (Ye et al., arXiv 2105.11618), the attention of one block decides. Nothing
is trained. A prompt takes less time, and the caches of later blocks hold fewer tokens; what is written behind it runs all blocks, so a
step gains no more than what it need not read. Known of any text is that a token runs the first blocks at least, and the share of a
prompt's keys and values that is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slimbench.methods.base import Citation, DenseModel
from slimbench.methods.core.policies import PolicyMethod
from slimbench.methods.formats.depth.reduction import Reduction
from slimbench.methods.formats.policy import Policy
from slimbench.methods.work import Work


@dataclass(frozen=True)
class TokenReduction(PolicyMethod):
    """Prompts that lose tokens on their way.

    Attributes:
        layer: Blocks that all tokens run; attention in the last of them decides. The default is a third of a model of 30 blocks.
        keep: Share of a prompt's tokens that run the other blocks too; 1: all.
    """

    name = "token-reduction"
    slot = "depth"
    citation = Citation("TR-BERT", year=2021, arxiv="2105.11618")

    layer: int = 10
    keep: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy()

    def policy(self, seed: int = 0) -> Policy:
        return Reduction(self.layer, self.keep)

    def claims(self, policy: Policy, dense: DenseModel) -> dict[str, Any]:
        assert isinstance(policy, Reduction)
        blocks = dense.shape.num_layers
        least, most = policy.runs(blocks)
        share = (self.layer + self.keep * (blocks - self.layer)) / blocks
        return {"work": Work(blocks=most, fewest_blocks=least), "details": {"prompt_cache_share": round(share, 4)}}
