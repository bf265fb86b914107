"""ShortGPT: blocks that hardly change the direction of the hidden states are left out.

The influence of block i, with X_i its inputs and X_{i+1} its outputs, is the mean over the tokens t of the calibration text of

    BI_i = 1 - X_{i,t} · X_{i+1,t} / (‖X_{i,t}‖₂ ‖X_{i+1,t}‖₂)

All influences are measured on the dense model at once; the blocks with the lowest are removed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slimbench.methods.base import DENSE, HUGGINGFACE, Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs, Unsupported
from slimbench.methods.formats.huggingface import save_dense


@dataclass(frozen=True)
class ShortGPT(Method):
    """The artefact is an ordinary model of fewer blocks.

    Attributes:
        fraction: Share of the blocks that is removed, rounded to whole blocks, at least one.
        blocks: Number of blocks to remove instead of a share; None: the share decides.
    """

    name = "shortgpt"
    citation = Citation("ShortGPT", year=2024, arxiv="2403.03853", covers=("pruning/shortgpt-depth-pruning",))
    needs = Needs(calibration=True)
    accepts = DENSE

    fraction: float = 0.25
    blocks: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction must be between 0 and 1, both excluded, not {self.fraction}")
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, not {self.blocks}")

    def check(self, shape: ModelShape) -> None:
        if self.count(shape.num_layers) >= shape.num_layers:
            raise Unsupported(f"{self.count(shape.num_layers)} blocks cannot be removed from {shape.num_layers}")

    def count(self, blocks: int) -> int:
        """How many of that many blocks are removed."""
        return self.blocks or max(1, round(self.fraction * blocks))

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.architecture.surgery import counts, remove_blocks
        from slimbench.methods.core.statistics import block_influence

        if not calibration.ids.numel():
            raise ValueError("calibration holds no tokens")
        model = dense.load()
        before = model.num_parameters()
        influence = block_influence(model, calibration.ids, dense.progress)
        removed = sorted(sorted(range(len(influence)), key=influence.__getitem__)[: self.count(len(influence))])
        remove_blocks(model, removed)
        save_dense(model, out)
        details = {
            "blocks_removed": removed,
            "block_influence": [round(value, 6) for value in influence],
            "parameters_before": before,
        }
        return Claim(HUGGINGFACE, **counts(model), details=details)
