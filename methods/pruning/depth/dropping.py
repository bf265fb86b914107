"""Leaving out blocks: what all methods do that choose some and remove them, so that a method is its choice alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimbench.methods.base import DENSE, HUGGINGFACE, Calibration, Claim, DenseModel, Method, ModelShape, Unsupported
from slimbench.methods.formats.huggingface import save_dense


@dataclass(frozen=True)
class Dropping(Method):
    """The artefact is an ordinary model of fewer blocks."""

    accepts = DENSE

    @abstractmethod
    def count(self, blocks: int) -> int:
        """How many of that many blocks go."""

    @abstractmethod
    def chosen(self, model: Any, blocks: int, calibration: Calibration, dense: DenseModel) -> tuple[list[int], dict[str, Any]]:
        """Indices of the blocks that go, rising, and what the claim says of the choice."""

    def weakest(self, influence: Sequence[float]) -> list[int]:
        """Indices of the blocks of the lowest influence, rising; as many as go."""
        import torch

        from slimbench.methods.core.masks import lowest

        scores = torch.tensor(influence, dtype=torch.float64)
        return [int(index) for index in lowest(scores, self.count(len(scores))).nonzero()]

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        if not 0 < self.count(shape.num_layers) < shape.num_layers:
            raise Unsupported(f"{self.count(shape.num_layers)} blocks cannot be removed from {shape.num_layers}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        if self.needs.calibration and not calibration.ids.numel():
            raise ValueError("calibration holds no tokens")
        model = dense.load()
        claim = self.shorten(model, calibration, dense)
        save_dense(model, out)
        dense.progress(1, 1)
        return claim

    def shorten(self, model: Any, calibration: Calibration, dense: DenseModel) -> Claim:
        """Take the chosen blocks out of a model, in place, and say what is left."""
        from slimbench.methods.core.architecture.surgery import counts, remove_blocks
        from slimbench.methods.formats.architecture.structure import blocks_of

        before = model.num_parameters()
        removed, details = self.chosen(model, len(blocks_of(model)), calibration, dense)
        remove_blocks(model, removed)
        return Claim(HUGGINGFACE, **counts(model), details=details | {"blocks_removed": removed, "parameters_before": before})


@dataclass(frozen=True)
class ShareDropping(Dropping):
    """So many blocks go.

    Attributes:
        fraction: Share of the blocks that is removed, rounded to whole blocks, at least one.
        blocks: Number of blocks to remove instead of a share; None: the share decides.
    """

    fraction: float = 0.25
    blocks: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction must be between 0 and 1, both excluded, not {self.fraction}")
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, not {self.blocks}")

    def count(self, blocks: int) -> int:
        return self.blocks or max(1, round(self.fraction * blocks))
