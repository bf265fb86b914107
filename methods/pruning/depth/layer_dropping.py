"""Dropping layers (Sajjad et al., arXiv 2004.03844): blocks go by where they stand, or by how little they change, without training.

Strategies for K of L blocks, which are numbered from 1 at the bottom:

    top               L-K+1 … L
    bottom            1 … K
    even-alternate    every other block downwards from the highest even number: 6, 8, 10, 12 of 12
    odd-alternate     the same for odd numbers: 5, 7, 9, 11 of 12
    symmetric         the K in the middle; where L-K is odd, one more stays at the bottom
    contribution      those whose outputs are most similar to their inputs: the highest mean cosine

The paper measures contribution at the token that stands for a sentence: the first one of BERT, the last one of XLNet. Of a causal model it
is the last one of a sample. It drops what lies above a threshold; here K says how many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from slimbench.methods.base import Calibration, Citation, DenseModel, ModelShape, Needs, Unsupported
from slimbench.methods.pruning.depth.dropping import ShareDropping

CITATION = Citation("Dropping layers", year=2020, arxiv="2004.03844", covers=("pruning/sajjad-et-al-layer-dropping",))
Strategy = Literal["top", "bottom", "even-alternate", "odd-alternate", "symmetric"]


@dataclass(frozen=True)
class LayerDropping(ShareDropping):
    """Blocks go by where they stand; the fine-tuning that follows in the paper is another step of a pipeline.

    Attributes:
        strategy: Which, see the equations.
    """

    name = "layer-dropping"
    citation = CITATION

    strategy: Strategy = "top"

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        places(self.strategy, shape.num_layers, self.count(shape.num_layers))

    def chosen(self, model: Any, blocks: int, calibration: Calibration, dense: DenseModel) -> tuple[list[int], dict[str, Any]]:
        return places(self.strategy, blocks, self.count(blocks)), {}


@dataclass(frozen=True)
class ContributionDropping(ShareDropping):
    """The blocks go that contribute least; the fine-tuning that follows in the paper is another step of a pipeline."""

    name = "contribution-dropping"
    citation = CITATION
    needs = Needs(calibration=True)

    def chosen(self, model: Any, blocks: int, calibration: Calibration, dense: DenseModel) -> tuple[list[int], dict[str, Any]]:
        from slimbench.methods.core.statistics import block_influence

        influence = block_influence(model, calibration.ids, dense.progress, last=True)
        return self.weakest(influence), {"block_influence": [round(value, 6) for value in influence]}


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
