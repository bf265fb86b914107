"""What APT measures of heads and channels while adapters learn, and what it makes of it: masks that fade, and ranks that grow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slimbench.methods.core.architecture.units import Structures, cheapest, price
from slimbench.methods.core.learning.beside import Beside
from slimbench.methods.core.learning.gradual import Cubic
from slimbench.methods.core.learning.hooks import Hooks


class Salience(Hooks):
    """Masks of structures and ranks of adapters.

    Attributes:
        averages: S̄ [count] of each kind, by the full name of the layer that reads it; so are `gates`, 0..1, and `gone`.
        ranks: Of each adapter, how many rows of A and columns of B take part; the others are not updated, and those of B are zero.
        teacher: A and B of each adapter as they were when pruning began.
        step: The one that is on.
    """

    def __init__(
        self, beside: Beside, kinds: Mapping[str, Structures], wanted: int, growth: Cubic, memory: float, fade: float, rank: int
    ) -> None:
        """Masks are open, and ranks as small as they ever are.

        Args:
            beside: Adapters of the largest rank.
            wanted: Parameters of structures that go in the end.
            growth: What share of them goes after a step; the rest of the ranks takes part by and by over the same steps.
            memory: β.
            fade: By how much a mask moves in a step.
            rank: Of all adapters at first.
        """
        self.beside, self.kinds, self.wanted, self.growth, self.memory, self.fade = beside, dict(kinds), wanted, growth, memory, fade
        self.first, self.most = rank, len(next(iter(beside.pairs.values()))[0])
        ones = {name: torch.ones(kind.count, device=kind.reads.weight.device) for name, kind in kinds.items()}
        self.gates = {name: values.clone() for name, values in ones.items()}
        self.averages = {name: torch.zeros_like(values) for name, values in ones.items()}
        self.gone = {name: torch.zeros_like(values, dtype=torch.bool) for name, values in ones.items()}
        self.ranks = dict.fromkeys(beside.pairs, rank)
        self.importance = dict.fromkeys(beside.pairs, 0.0)
        self.teacher = self._copied()
        self.step = 0
        self.seen: dict[str, list[Tensor]] = {}
        self.names = {layer: name for name, layer in beside.layers.items()}
        self.placed = [self._watch(name, kind.reads) for name, kind in kinds.items()]

    def _copied(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (first.detach().clone(), second.detach().clone()) for name, (first, second) in self.beside.pairs.items()}

    def _watch(self, name: str, reads: nn.Linear) -> RemovableHandle:
        """Sum up the magnitudes of the inputs of a layer and of their gradients, and the inputs, over the tokens of a step."""

        def add(place: int, values: Tensor) -> None:
            self.seen[name][place] += values

        def see(_: Any, args: tuple[Tensor]) -> None:
            if not torch.is_grad_enabled():
                return
            x = args[0]
            flat = x.detach().flatten(0, -2).float()
            held = self.seen.setdefault(name, [torch.zeros(flat.shape[1], device=flat.device) for _ in range(3)] + [torch.zeros(())])
            held[0] += flat.abs().sum(0)
            held[1] += flat.sum(0)
            held[3] += len(flat)
            x.register_hook(lambda gradient: add(2, gradient.flatten(0, -2).float().abs().sum(0)))

        return reads.register_forward_pre_hook(see)

    def finish(self) -> None:
        """Look at no more inputs."""
        for handle in self.placed:
            handle.remove()

    def salience(self, name: str) -> Tensor:
        """Ŝ [count] of the structures of a kind, of the step that is on."""
        kind, (sizes, sums, gradients, tokens) = self.kinds[name], self.seen[name]
        found = (sizes * gradients).view(kind.count, -1).sum(1)
        for layer in kind.makes:
            if (adapter := self.names.get(layer)) is not None:
                second = self.beside.pairs[adapter][1]
                assert second.grad is not None
                found += self.beside.scale * (second.detach() * second.grad).abs().view(kind.count, -1).sum(1)
        outputs = kind.reads.weight.detach().float() * (sums / tokens.to(sums.device))
        return found + kurtosis(outputs.T.reshape(kind.count, -1)).clamp_min(0).sqrt()

    def after_backward(self, step: int) -> None:
        for name in self.kinds:
            self.averages[name].mul_(self.memory).add_(self.salience(name), alpha=1 - self.memory)
        self.seen = {}
        for name, (first, second) in self.beside.pairs.items():
            assert first.grad is not None and second.grad is not None
            first.grad[self.ranks[name] :] = 0
            second.grad[:, self.ranks[name] :] = 0
            self.importance[name] = float((second.detach() * second.grad).abs().sum())

    def budget(self, step: int) -> float:
        """Δ after a step, as a multiple of what it is at first: it grows evenly while structures go."""
        begin, end = self.growth.begin, self.growth.end
        return 1 + (self.most / self.first - 1) * min(1.0, max(0.0, (step - begin) / (end - begin)))

    def adjust(self, done: int, before: int) -> None:
        """Choose anew what goes, and let the ranks of the more important half of the adapters grow.

        Args:
            before: The step after which that was done last.
        """
        wanted = round(self.growth.at(done) * self.wanted)
        if wanted:
            densities = {name: values / price(self.kinds[name]) for name, values in self.averages.items()}
            self.gone = cheapest(densities, self.kinds, wanted)
        order = sorted(self.importance, key=lambda name: -self.importance[name])
        for name in order[: len(order) // 2]:
            self.ranks[name] = min(self.most, int(self.ranks[name] * self.budget(done) / self.budget(before) + 1e-9))

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        done, growth = step + 1, self.growth
        if done == growth.begin:
            self.teacher = self._copied()
        every = max(1, (growth.end - growth.begin) // 4)
        if done == growth.end or (growth.begin < done < growth.end and (done - growth.begin) % every == 0):
            self.adjust(done, max(growth.begin, growth.begin + (done - 1 - growth.begin) // every * every))
        for name, gate in self.gates.items():
            gate.add_(torch.where(self.gone[name], -self.fade, self.fade)).clamp_(0, 1)
        self.step = done

    def state(self) -> dict[str, Tensor]:
        parts: dict[str, Mapping[str, Tensor]] = {"average": self.averages, "gate": self.gates, "gone": self.gone}
        found = {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
        found |= {f"teacher/{name}/{side}": value for name, pair in self.teacher.items() for side, value in zip("AB", pair, strict=True)}
        return found | {"ranks": torch.tensor([*self.ranks.values(), self.step])}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, gate in self.gates.items():
            self.averages[name].copy_(state[f"average/{name}"])
            gate.copy_(state[f"gate/{name}"])
            self.gone[name] = state[f"gone/{name}"].to(gate.device)
        for name, (first, second) in self.teacher.items():
            first.copy_(state[f"teacher/{name}/A"])
            second.copy_(state[f"teacher/{name}/B"])
        *ranks, self.step = state["ranks"].tolist()
        self.ranks = dict(zip(self.ranks, ranks, strict=True))


def kurtosis(values: Tensor) -> Tensor:
    """Mean fourth power of standardized values [n, count] along the last dimension, less the 3 that a normal law has: [n]."""
    deviation = values.std(1, keepdim=True).clamp_min(1e-30)
    return ((values - values.mean(1, keepdim=True)) / deviation).pow(4).mean(1) - 3
