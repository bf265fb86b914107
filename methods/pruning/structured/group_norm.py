"""Norm of a group, as Torch-Pruning (arXiv 2301.12900) has it: units of a block are ranked by all their weights together.

For a unit, a group of heads or a channel, and all weights w that every layer would lose with it,

    ‖w‖₂ = (Σ w²)^½        or        Σ |w|

Biases are not counted. No data is needed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import HUGGINGFACE, Calibration, Citation, Claim, DenseModel, Method
from slimbench.methods.core.settings import Smaller
from slimbench.methods.formats.huggingface import save_dense

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GroupNorm(Smaller, Method):
    """Each block loses the same number of groups of heads and of channels, so that an ordinary checkpoint is left.

    Attributes:
        ratio: Share of the groups of heads and of the channels that goes, rounded to whole ones; one of each stays.
        norm: 2 for the root of the sum of squares, 1 for the sum of magnitudes.
    """

    name = "group-norm"
    citation = Citation("Group norm", year=2023, arxiv="2301.12900")

    norm: Literal[1, 2] = 2

    def left(self, count: int) -> int:
        """How many of that many units stay."""
        return max(1, count - int(self.ratio * count + 0.5))

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.core.architecture.anatomy import anatomy
        from slimbench.methods.core.architecture.surgery import cache_bytes_per_token, counts
        from slimbench.methods.core.architecture.uniform import Kept, check, narrow, sizes_of
        from slimbench.methods.core.architecture.units import best, structures

        model: Any = dense.load()
        before, full = model.num_parameters(), sizes_of(model)
        left = replace(full, groups=self.left(full.groups), channels=self.left(full.channels))
        check(model, left)
        kept: dict[str, list[Tensor]] = {"head_groups": [], "channels": []}
        for done, block in enumerate(anatomy(model)):
            for kind in structures(block):
                powers = {layer: layer.weight.detach().float().abs() ** self.norm for layer in (*kind.makes, kind.reads)}
                kept[kind.name].append(best(kind.scores(powers, "sum") ** (1 / self.norm), self.left(kind.count)))
            dense.progress(done + 1, full.blocks)
        narrow(model, Kept(torch.arange(full.hidden), kept["head_groups"], kept["channels"]))
        save_dense(model, out)
        details = {"sizes_before": asdict(full), "sizes_left": asdict(left), "parameters_before": before}
        return Claim(HUGGINGFACE, **counts(model), cache_bytes_per_token=cache_bytes_per_token(model), details=details)
