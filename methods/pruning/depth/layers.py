"""Leaving out blocks by where they stand, or by how little they change, without training.

Strategies of Sajjad et al. for K of L blocks, which are numbered from 1 at the bottom:

    top               L-K+1 … L
    bottom            1 … K
    even-alternate    every other block downwards from the highest even number: 6, 8, 10, 12 of 12
    odd-alternate     the same for odd numbers: 5, 7, 9, 11 of 12
    symmetric         the K in the middle; where L-K is odd, one more stays at the bottom
    contribution      those whose outputs are most similar to their inputs: the highest mean cosine

The paper measures contribution at the token that stands for a sentence, the first one of BERT; of a causal model that is the last one of
a sample. It drops what lies above a threshold; here K says how many.

LayerDrop trains with blocks dropped at random so that a shallower model can be taken out afterwards, and at a rate p leaves out the
blocks d with

    d ≡ 0 mod ⌊1/p⌋

Here the model was not trained so: its selection alone is what `EveryOther` has of LayerDrop.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from slimbench.methods.base import DENSE, HUGGINGFACE, Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs, Unsupported
from slimbench.methods.formats.huggingface import save_dense

Strategy = Literal["top", "bottom", "even-alternate", "odd-alternate", "symmetric"]


@dataclass(frozen=True)
class Dropping(Method):
    """The artefact is an ordinary model of fewer blocks."""

    accepts = DENSE

    @abstractmethod
    def count(self, blocks: int) -> int:
        """How many of that many blocks go."""

    @abstractmethod
    def chosen(self, model: Any, blocks: int, calibration: Calibration, dense: DenseModel) -> list[int]:
        """Indices of the blocks that go, rising."""

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        if not 0 < self.count(shape.num_layers) < shape.num_layers:
            raise Unsupported(f"{self.count(shape.num_layers)} blocks cannot be removed from {shape.num_layers}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.architecture.surgery import counts, remove_blocks
        from slimbench.methods.formats.architecture.structure import blocks_of

        model = dense.load()
        before = model.num_parameters()
        removed = self.chosen(model, len(blocks_of(model)), calibration, dense)
        remove_blocks(model, removed)
        save_dense(model, out)
        dense.progress(1, 1)
        return Claim(HUGGINGFACE, **counts(model), details={"blocks_removed": removed, "parameters_before": before})


@dataclass(frozen=True)
class ShareDropping(Dropping):
    """So many blocks go.

    Attributes:
        fraction: Share of the blocks that is removed, rounded to whole blocks, at least one.
        blocks: Number of blocks to remove instead of a share; None: the share decides.
    """

    citation = Citation("Dropping layers", year=2020, arxiv="2004.03844", covers=("pruning/sajjad-et-al-layer-dropping",))

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


@dataclass(frozen=True)
class LayerDropping(ShareDropping):
    """Blocks go by where they stand; the fine-tuning that follows in the paper is another step of a pipeline.

    Attributes:
        strategy: Which, see the equations.
    """

    name = "layer-dropping"

    strategy: Strategy = "top"

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        places(self.strategy, shape.num_layers, self.count(shape.num_layers))

    def chosen(self, model: Any, blocks: int, calibration: Calibration, dense: DenseModel) -> list[int]:
        return places(self.strategy, blocks, self.count(blocks))


@dataclass(frozen=True)
class ContributionDropping(ShareDropping):
    """The blocks go that contribute least; the fine-tuning that follows in the paper is another step of a pipeline."""

    name = "contribution-dropping"
    needs = Needs(calibration=True)

    def chosen(self, model: Any, blocks: int, calibration: Calibration, dense: DenseModel) -> list[int]:
        import torch

        from slimbench.methods.core.masks import lowest
        from slimbench.methods.core.statistics import block_influence

        if not calibration.ids.numel():
            raise ValueError("calibration holds no tokens")
        influence = torch.tensor(block_influence(model, calibration.ids, dense.progress, last=True), dtype=torch.float64)
        return [int(index) for index in lowest(influence, self.count(blocks)).nonzero()]


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

    def chosen(self, model: Any, blocks: int, calibration: Calibration, dense: DenseModel) -> list[int]:
        return [number - 1 for number in range(1, blocks + 1) if number % self.period == 0]


def places(strategy: Strategy, blocks: int, count: int) -> list[int]:
    """Indices, from 0, of the blocks that go by where they stand.

    Raises:
        Unsupported: There are not so many of that kind.
    """
    parity = {"even-alternate": 0, "odd-alternate": 1}
    if strategy in parity:
        numbers = [number for number in range(blocks, 0, -1) if number % 2 == parity[strategy]]
        if count > len(numbers):
            raise Unsupported(f"{count} blocks cannot be removed from the {len(numbers)} of {blocks} that {strategy} takes")
        return sorted(number - 1 for number in numbers[:count])
    first = {"top": blocks - count, "bottom": 0, "symmetric": (blocks - count + 1) // 2}[strategy]
    return list(range(first, first + count))
