"""ShortGPT: blocks that hardly change the direction of the hidden states are left out.

The influence of block i, with X_i its inputs and X_{i+1} its outputs, is the mean over the tokens t of the calibration text of

    BI_i = 1 - X_{i,t} · X_{i+1,t} / (‖X_{i,t}‖₂ ‖X_{i+1,t}‖₂)

All influences are measured on the dense model at once; the blocks with the lowest are removed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slimbench.methods.base import Calibration, Citation, DenseModel, Needs
from slimbench.methods.pruning.depth.dropping import ShareDropping


@dataclass(frozen=True)
class ShortGPT(ShareDropping):
    """The blocks of the lowest influence go."""

    name = "shortgpt"
    citation = Citation("ShortGPT", year=2024, arxiv="2403.03853", covers=("pruning/shortgpt-depth-pruning",))
    needs = Needs(calibration=True)

    def chosen(self, model: Any, blocks: int, calibration: Calibration, dense: DenseModel) -> tuple[list[int], dict[str, Any]]:
        from slimbench.methods.core.statistics import block_influence

        influence = block_influence(model, calibration.ids, dense.progress)
        return self.weakest(influence), {"block_influence": [round(value, 6) for value in influence]}
