"""HyperAttention: most of the attention of a long prompt is estimated (Han et al., arXiv 2310.05869)."""

from __future__ import annotations

from dataclasses import dataclass

from slimbench.methods.base import Citation
from slimbench.methods.core.policies import PolicyMethod
from slimbench.methods.formats.attention.hyper import Hyper
from slimbench.methods.formats.policy import Policy


@dataclass(frozen=True)
class HyperAttention(PolicyMethod):
    """Sorted blocks and samples (`methods.formats.attention.hyper`), with the authors' settings for texts of 32,768 tokens and more.

    Attributes:
        block: Keys of a block.
        samples: Keys that are drawn for all queries of a half.
        projections: Bits of a hash.
        shortest: Tokens of a half from which on it is estimated how it sees the other: a prompt of fewer than twice as many is exact.
        seed: Of directions and draws.
    """

    name = "hyper-attention"
    slot = "attention"
    citation = Citation("HyperAttention", year=2023, arxiv="2310.05869", covers=("compact/hyperattention",))
    draws = True

    block: int = 256
    samples: int = 256
    projections: int = 7
    shortest: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy()

    def policy(self, seed: int = 0) -> Policy:
        return Hyper(self.block, self.samples, self.projections, self.shortest, self.seed + seed)
