"""The base of a model with a router before each block (`methods.formats.depth.router`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimbench.methods.formats.depth.rows import Partial, linear, run_block


class Routed(Partial):
    """Arguments as of `methods.formats.depth.router.Router`.

    Attributes:
        ran: Of each block, tokens that it ran for since this was made; the policy's own count.
        times: How many tokens ran so many blocks; its own count too.
    """

    def __init__(self, model: Any, threshold: float, routers: Mapping[str, Tensor]) -> None:
        super().__init__(model)
        self.threshold, self.ran, self.times = threshold, [0] * self.blocks, Counter[int]()
        held = [str(index) for index in range(self.blocks) if f"{index}.weight" in routers]
        self.routers = nn.ModuleDict({index: linear(model, routers[f"{index}.weight"][None], routers[f"{index}.bias"]) for index in held})

    def through(self, hidden: Tensor, rotations: tuple[Tensor, Tensor], cache: Any, first: int) -> Tensor:
        ran: list[Tensor] = []
        for index, block in enumerate(self._base[0].layers[: self.blocks]):
            active = self.let_in(index, hidden).nonzero()[:, 0]
            hidden = run_block(block, hidden, active, rotations, cache, first)
            self.ran[index] += len(active)
            ran.append(active)
        self.times.update(torch.cat(ran).bincount(minlength=hidden.shape[1]).tolist())
        return hidden

    def tokens_by_blocks(self) -> dict[int, int]:
        return dict(self.times)

    def let_in(self, index: int, hidden: Tensor) -> Tensor:
        """Whether a block runs for tokens with the states [1, T, d], bool [T]."""
        if str(index) not in self.routers:
            return torch.ones(hidden.shape[1], dtype=torch.bool, device=hidden.device)
        return torch.sigmoid(self.routers[str(index)](hidden)[0, :, 0].float()) > self.threshold
