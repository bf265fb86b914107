"""The own CPU kernel for whole decoders of packed weights: the class `slimbench::PackedBlocks` (see `blocks.cpp`)."""

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
    """Why the class cannot be had here, in one line; None once it is compiled, or found in the cache, and registered."""
    if reason := build.missing():
        return reason
    try:
        library.load(SOURCE)
    except (NotBuilt, OSError) as error:
        return " ".join(str(error).split())
    return None


def takes(layer: nn.Module) -> bool:
    """Whether a layer is one of those that the class multiplies: packed in bfloat16, and nothing is added to its product."""
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
    """The weights of a decoder, as the class wants them.

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
        codes, scales, offsets = ([each.get(name) for each in kept] for name in ("weight_packed", "scales", "offsets"))
        bits, outputs = [layer.grid.bits for layer in self.layers], [layer.out_features for layer in self.layers]
        made = torch.classes.slimbench.PackedBlocks
        self._step = made(list(self.norms), codes, scales, offsets, bits, outputs, self.cos, self.sin, self.epsilon, self.scaling).step

    def __call__(self, x: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[Tensor]) -> Tensor:
        """A prompt, or one token, of each sequence through all blocks.

        Args:
            x: Their embeddings, [sequences, tokens, hidden], bfloat16; more than one token only where the cache holds none.
            keys: Of each block, [sequences, groups, room, width], bfloat16; they get those of the tokens.
            values: Likewise.
            lengths: Of each block the tokens that its cache holds, int64; more by `tokens` afterwards.

        Returns:
            What the head multiplies at the last token of each, [sequences, hidden].
        """
        found: Tensor = self._step(x, keys, values, lengths)
        return found
