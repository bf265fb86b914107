"""DoLa: the last block's prediction against that of an early one, for truer answers (Chuang et al., arXiv 2309.03883).

Nothing is saved: it is among the early exits because it reads the same early predictions (`methods.formats.depth.contrast`). It acts where
text is written; no text is scored with it. No work is claimed: all blocks run for every token, and the head more often than without it.
The paper adds a penalty of 1.2 for repetitions, which greedy decoding here has not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.depth.contrast import Contrast
from slimbench.methods.formats.policy import Acts

_BUCKET = 20
"""Blocks among which candidates lie at most."""


@dataclass(frozen=True)
class Dola(Acts, Method):
    """Contrasts of blocks.

    Attributes:
        half: In which the candidates lie, every second block; `lower` for answers with steps, `upper` for short ones (§3). Of more than 40
            blocks the first or last 20, as the authors' program has it.
        floor: Share of the largest probability that a token must have.
    """

    name = "dola"
    version = 2
    slot = "depth"
    citation = Citation("DoLa", year=2023, arxiv="2309.03883")
    needs = Needs(weights=False)
    accepts = policies.ADDED
    produces = policies.FORMAT

    half: Literal["lower", "upper"] = "lower"
    floor: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy()

    def policy(self, shape: ModelShape | None = None) -> Contrast:
        """Even numbers of blocks; not the embeddings where the head is the same matrix, which would predict the token itself.

        Args:
            shape: None: no candidates, since they depend on it.
        """
        if shape is None:
            return Contrast((), self.floor)
        blocks, most = shape.num_layers, min(shape.num_layers - shape.num_layers // 2, _BUCKET)
        span = range(min(blocks // 2, _BUCKET)) if self.half == "lower" else range(blocks - most, blocks)
        places = tuple(place for place in span if place % 2 == 0 and (place or not shape.tied_embeddings))
        return Contrast(places or (1,), self.floor)

    def check(self, shape: ModelShape) -> None:
        self.policy(shape).check(shape)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        policy = self.policy(dense.shape)
        policies.save(policy, dense, out)
        return Claim(self.produces, details={"candidates": list(policy.candidates)})
