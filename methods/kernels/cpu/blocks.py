"""The own CPU kernel for whole decoders of packed weights: `slimbench::packed_blocks` (see `blocks.cpp`)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimbench.methods.kernels.cpu import build, library
from slimbench.methods.kernels.cpu.kernel import LANES, OwnCpu
from slimbench.methods.kernels.cpu.library import NotBuilt
from slimbench.methods.kernels.packed_linear import PackedLinear
from slimbench.util.compat.torch import buffers

NAME = "slimbench packed_blocks"
SOURCE = Path(__file__).with_name("blocks.cpp")


@functools.cache
def missing() -> str | None:
    """Why the operator cannot be had here, in one line; None once it is compiled, or found in the cache, and registered."""
    if reason := build.missing():
        return reason
    try:
        library.load(SOURCE)
    except (NotBuilt, OSError) as error:
        return " ".join(str(error).split())
    return None


def takes(layer: nn.Module) -> bool:
    """Whether a layer is one of those that the operator multiplies: packed in bfloat16, and nothing is added to its product."""
    return (
        type(layer) is PackedLinear
        and layer.kernel == OwnCpu.name
        and layer.dtype is torch.bfloat16
        and layer.bias is None
        and not (layer.sparse or layer.has_low_rank)
        and layer.in_features % LANES == layer.out_features % LANES == 0
    )


@dataclass
class Blocks:
    """The weights of a decoder, as the operator wants them.

    Args:
        norms: Weights of the norms before attention and before the MLP of each block, and of the last one.
        layers: Seven of each block: queries, keys, values, output, gate, up, down.
        epsilon: Of the norms.
        scaling: Of the scores of attention.
        cos: Of each position, [positions, width], bfloat16.
        sin: Likewise.
    """

    norms: Sequence[Tensor]
    layers: Sequence[PackedLinear]
    epsilon: float
    scaling: float
    cos: Tensor
    sin: Tensor

    def __post_init__(self) -> None:
        kept: list[Any] = [buffers(layer) for layer in self.layers]
        self._weights = (
            [each["weight_packed"] for each in kept],
            [each["scales"] for each in kept],
            [each.get("offsets") for each in kept],
            [layer.grid.bits for layer in self.layers],
            [layer.out_features for layer in self.layers],
        )

    def __call__(self, x: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[Tensor]) -> Tensor:
        """One token of each sequence through all blocks.

        Args:
            x: Their embeddings, [sequences, hidden], bfloat16.
            keys: Of each block, [sequences, groups, room, width], bfloat16; they get those of the token.
            values: Likewise.
            lengths: Of each block the tokens that its cache holds, int64; one more afterwards.

        Returns:
            What the head multiplies, [sequences, hidden].
        """
        found: Tensor = torch.ops.slimbench.packed_blocks(
            x, keys, values, lengths, self.cos, self.sin, self.norms, *self._weights, self.epsilon, self.scaling
        )
        return found
