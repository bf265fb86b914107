"""LayerDrop (arXiv 1909.11556): a shallower model is taken out of one that was trained to do without some of its blocks.

It trains with blocks dropped at random, and afterwards leaves out, at a rate p, the blocks d with

    d ≡ 0 mod ⌊1/p⌋

Here the model was not trained so: its selection alone is what `EveryOther` has of LayerDrop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from slimbench.methods.base import Calibration, Citation, DenseModel
from slimbench.methods.pruning.depth.dropping import Dropping


@dataclass(frozen=True)
class EveryOther(Dropping):
    """The selection of LayerDrop from a model that was not trained for it.

    Attributes:
        rate: p, at most one half: every ⌊1/p⌋-th block goes.
    """

    name = "every-other"
    citation = Citation("LayerDrop", year=2019, arxiv="1909.11556")

    rate: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate <= 0.5:
            raise ValueError(f"rate must be above 0 and at most 0.5, not {self.rate}")

    @property
    def period(self) -> int:
        """⌊1/p⌋"""
        return math.floor(1 / self.rate + 1e-9)

    def count(self, blocks: int) -> int:
        return blocks // self.period

    def chosen(self, model: Any, blocks: int, calibration: Calibration, dense: DenseModel) -> tuple[list[int], dict[str, Any]]:
        return [number - 1 for number in range(1, blocks + 1) if number % self.period == 0], {}
