"""What calibration tells of the inputs of linear layers: ranges, second moments, and how the layers of a block share them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slimbench.methods.core.walk import Block, walk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAMPLE = 512


@dataclass
class Inputs:
    """Statistics of the inputs [tokens, in] of a layer over the calibration tokens; all float32.

    Attributes:
        low: Smallest value of each channel, [in].
        high: Largest value of each channel, [in].
        squares: Mean of the squares of each channel, [in].
        gram: Mean of x xᵀ, [in, in]; None unless it was asked for.
        tokens: How many there were.
    """

    low: Tensor
    high: Tensor
    squares: Tensor
    gram: Tensor | None = None
    tokens: int = 0

    @property
    def largest(self) -> Tensor:
        """Largest magnitude of each channel, [in]."""
        return torch.maximum(-self.low, self.high).clamp_min(0)

    def add(self, x: Tensor, gram: bool) -> None:
        """Take in the inputs [tokens, in] of one batch."""
        x = x.float()
        share = len(x) / (self.tokens + len(x))
        self.tokens += len(x)
        self.low, self.high = torch.minimum(self.low, x.amin(0)), torch.maximum(self.high, x.amax(0))
        self.squares += share * (x.square().mean(0) - self.squares)
        if gram:
            now = x.T @ x / len(x)
            self.gram = now if self.gram is None else self.gram + share * (now - self.gram)


def inputs(block: Block, layers: Sequence[str] | None = None, gram: bool = False) -> dict[str, Inputs]:
    """Statistics of the inputs of the linear layers of a block, by full name; those of other layers than the wanted are left out."""
    found: dict[str, Inputs] = {}

    def observe(name: str, x: Tensor) -> None:
        if name not in found:
            width = x.shape[1]
            far = torch.full((width,), torch.inf, device=x.device)
            found[name] = Inputs(far, -far, torch.zeros(width, device=x.device))
        found[name].add(x, gram)

    block.observe(observe, layers)
    return found


def samples(block: Block, layers: Sequence[str], tokens: int = _SAMPLE) -> dict[str, Tensor]:
    """Inputs [about `tokens`, in] of some layers, evenly spread over each batch; float32."""
    found: dict[str, list[Tensor]] = {}
    total = sum(hidden.shape[0] * hidden.shape[1] for hidden in block.inputs)
    step = max(1, total // tokens)
    block.observe(lambda name, x: found.setdefault(name, []).append(x[::step].float()), layers)
    return {name: torch.cat(parts) for name, parts in found.items()}


def of_model(
    model: PreTrainedModel, ids: Tensor, progress: Callable[[float, float], None] | None = None, gram: bool = False
) -> dict[str, Inputs]:
    """Statistics of the inputs of all linear layers in the blocks of an unchanged model."""
    return {name: statistics for block in walk(model, ids, progress) for name, statistics in inputs(block, gram=gram).items()}
