"""Quantizing a decoder block by block, each layer on the second moments of the inputs that the quantized layers before it give it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from slimbench.methods.base import Unsupported
from slimbench.methods.core.second_order import Moments
from slimbench.methods.core.walk import Block, walk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slimbench.methods.kernels.grid import QuantizedWeight


class Encoded(Protocol):
    """A weight in whatever form, that knows what it stands for."""

    def dequantize(self) -> Tensor: ...


E = TypeVar("E", bound=Encoded)

Quantizer = Callable[[str, Tensor, Moments], E]
"""From the full name of a layer, its weight [out, in] and the moments of its inputs."""


@dataclass
class Tally:
    """What weights take up, counted while they pass by.

    Attributes:
        code_bits: Bits of all codes.
        stored_bits: Bits of everything that is stored: codes, scales, offsets, outliers.
        weights: Weights that these stand for.
        outliers: How many are kept beside their grid.
        scales: How many scales they share.
    """

    code_bits: int = 0
    stored_bits: int = 0
    weights: int = 0
    outliers: int = 0
    scales: int = 0

    @property
    def group_size(self) -> int:
        """Weights that share a scale, the mean rounded down."""
        return self.weights // self.scales

    def count(self, weights: Iterable[tuple[str, QuantizedWeight]]) -> Iterator[tuple[str, QuantizedWeight]]:
        """The same weights."""
        for name, weight in weights:
            apart = weight.outliers
            self.weights += weight.codes.numel()
            self.code_bits += weight.grid.bits * weight.codes.numel()
            self.scales += weight.scales.numel()
            self.outliers += 0 if apart is None else len(apart.values)
            kept = [weight.scales, weight.offsets, *(vars(apart).values() if apart else ())]
            self.stored_bits += weight.grid.bits * weight.codes.numel() + sum(8 * t.nbytes for t in kept if t is not None)
            yield name, weight

    def details(self) -> dict[str, float]:
        """For a claim: what a weight takes up, with a hundredth for what kernels fill up, and the share of outliers."""
        found = {"stored_bits": round(1.01 * self.stored_bits / self.weights, 4)}
        return found | ({"outlier_fraction": round(self.outliers / self.weights, 6)} if self.outliers else {})


@torch.no_grad()
def quantize_blocks(
    model: PreTrainedModel,
    ids: Tensor,
    quantizer: Quantizer[E],
    progress: Callable[[float, float], None] | None = None,
    drift: bool = False,
    expand: Callable[[str, E], Tensor] | None = None,
) -> Iterator[tuple[str, E]]:
    """Quantize the linear layers of all blocks in the order in which they run; the model then computes with the rounded weights.

    Args:
        ids: Calibration tokens, int64 [samples, length].
        progress: Told of finished blocks.
        drift: Measure what the inputs have lost against those of the uncompressed model.
        expand: The weight [out, in] that a layer computes with, from its name and the quantized one; None: the latter, dequantized.
    """
    for block in walk(model, ids, progress, dense=drift):
        layers = block.linears()
        dense = Block(block.name, deepcopy(block.module), block.dense_inputs, block.arguments) if drift else None
        for stage in block.stages():
            moments = measure(block, stage, dense)
            for name in stage:
                weight = quantizer(name, layers[name].weight.detach(), moments)
                layers[name].weight.copy_(weight.dequantize() if expand is None else expand(name, weight))
                yield name, weight


def measure(block: Block, stage: Sequence[str], dense: Block | None = None) -> Moments:
    """The moments of the inputs that some layers of a block share.

    Args:
        dense: The uncompressed block with the inputs that it has in the uncompressed model.

    Raises:
        Unsupported: Tokens are routed in another way than in the uncompressed model.
    """
    name = stage[0]
    layer = block.linears()[name]
    moments = Moments.zeros(layer.in_features, layer.weight.device, drift=dense is not None)
    for batch in range(len(block.inputs)):
        seen = block.inputs_of([name], batch).get(name)
        wanted = None if dense is None else dense.inputs_of([name], batch).get(name)
        if dense is not None and (0 if seen is None else len(seen)) != (0 if wanted is None else len(wanted)):
            raise Unsupported(f"{name} sees other tokens than in the uncompressed model, so its inputs cannot be compared")
        if seen is not None:
            moments.add(seen, wanted)
    return moments
