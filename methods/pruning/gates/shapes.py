"""Nested gates that end at given sizes: a Lagrangian for each kind of unit, and a cut that leaves an ordinary model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimbench.methods.core.architecture.surgery import remove_blocks
from slimbench.methods.core.architecture.uniform import Kept, Sizes, narrow
from slimbench.methods.core.architecture.units import best
from slimbench.methods.core.learning.gates import Pace, compared
from slimbench.methods.core.masks import lowest
from slimbench.methods.pruning.gates.nested import NestedGates

KINDS = {"blocks": "blocks", "hidden": "hidden", "head_groups": "groups", "channels": "channels"}
"""Kinds of units, and which of the sizes of a model counts them."""


class ShapedGates(NestedGates):
    """Gates on blocks, heads, channels and features; the multipliers are those of the kinds, [4], in the order of `KINDS`.

    Attributes:
        full: Sizes of the model.
        target: Sizes in the end.
        shares: t of each kind, [4], in the end.
        path: For each step the share of the parameters of units that was expected to go after it and that of the target then, and ŝ
            (the mean over blocks), t, λ₁ and λ₂ of each kind.
    """

    def __init__(self, model: Any, full: Sizes, target: Sizes, pace: Pace) -> None:
        self.full, self.target_sizes = full, target
        self.shares = torch.tensor([1 - getattr(target, size) / getattr(full, size) for size in KINDS.values()])
        super().__init__(model, 0.0, pace, ("blocks",))
        device = self.nest.stream.head.weight.device
        self.shares = self.shares.to(device)
        self.multipliers = tuple(nn.Parameter(torch.zeros(len(KINDS), device=device)) for _ in range(2))
        self.scale = torch.ones(len(KINDS), device=device)
        self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        self.begun = torch.stack([shares.mean() for shares in self.each(self.stays())])

    def fix(self, choose: Callable[[], Mapping[str, Tensor]], seed: int) -> None:
        super().fix(choose, seed)
        self._begin()

    def each(self, stays: Mapping[str, Tensor]) -> list[Tensor]:
        """ŝ of each kind: of heads and channels [blocks], of blocks and features [1]."""
        blocks = {kind: [1 - stays[name].mean() for name, of in self.nest.kinds.items() if of.name == kind] for kind in KINDS}
        return [torch.stack(blocks[kind] or [1 - stays[kind].mean()]) for kind in KINDS]

    def targets(self) -> Tensor:
        """t of each kind in the step that is on, [4]."""
        return self.begun + (self.shares - self.begun) * self.grown

    def priced(self) -> Tensor:
        first, second = self.multipliers
        gaps = [shares - target for shares, target in zip(self.each(self.stays()), self.targets(), strict=True)]
        prices = [(first[kind] * gap + second[kind] * gap.square()).mean() for kind, gap in enumerate(gaps)]
        return (self.scale * torch.stack(prices)).sum()

    def weighed(self) -> Tensor:
        kinds = zip(KINDS, self.each(self.stays()), strict=True)
        alphas = {kind: [alpha for name, alpha in self.alphas.items() if self._kind(name) == kind] for kind in KINDS}
        return torch.stack([compared(shares.mean(), alphas[kind]) for kind, shares in kinds])

    def row(self) -> tuple[float, ...]:
        expected, targets = self.stays(), self.targets()
        wanted = dict(zip(KINDS, 1 - targets, strict=True))
        even = {name: torch.full_like(stay, float(wanted[self._kind(name)])) for name, stay in expected.items()}
        whole = [1 - float(self.nest.size(stays)) / self.whole for stays in (expected, even)]
        means = [float(shares.mean()) for shares in self.each(expected)]
        by_kind = zip(means, targets.tolist(), *(value.tolist() for value in self.multipliers), strict=True)
        return (*whole, *(number for numbers in by_kind for number in numbers))

    def _kind(self, name: str) -> str:
        return self.nest.kinds[name].name if name in self.nest.kinds else name

    def chosen(self) -> dict[str, Tensor]:
        """What goes for the target, the blocks and the features of the lowest α and in each block the units of the lowest, as masks."""
        left = {kind: getattr(self.target_sizes, size) for kind, size in KINDS.items()}
        return {name: lowest(alpha.detach(), len(alpha) - left[self._kind(name)]) for name, alpha in self.alphas.items()}

    @torch.no_grad()
    def shape(self, model: Any) -> float:
        """Leave the target sizes of a model, in place, and return the share of the parameters of units that has gone.

        What stays is multiplied by ẑ first, as in `values`.
        """
        stays, values, target = self.stays(), self.values(), self.target_sizes
        self.nest.fold(values)
        removed = lowest(stays["blocks"], self.full.blocks - target.blocks).nonzero().flatten().tolist()
        left = [(name, kind.name) for name, kind in self.nest.kinds.items() if self.nest.places[name][1] not in removed]
        groups = [best(stays[name], target.groups) for name, of in left if of == "head_groups"]
        channels = [best(stays[name], target.channels) for name, of in left if of == "channels"]
        remove_blocks(model, removed)
        if (target.hidden, target.groups, target.channels) != (self.full.hidden, self.full.groups, self.full.channels):
            narrow(model, Kept(best(stays["hidden"], target.hidden), groups, channels))
        kinds = [self.nest.kinds[name] for name, _ in left]
        held = sum(kind.reads.weight.numel() + sum(p.numel() for layer in kind.makes for p in layer.parameters()) for kind in kinds)
        return 1 - held / self.whole
