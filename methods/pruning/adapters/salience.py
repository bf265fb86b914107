"""What APT measures of heads, channels and features while adapters learn, and what it makes of it: masks that fade, ranks that grow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from slimbench.methods.base import Unsupported
from slimbench.methods.core.architecture.units import Structures, cheapest, price
from slimbench.methods.core.learning.beside import Beside
from slimbench.methods.core.learning.gates import multiplied
from slimbench.methods.core.learning.gradual import Cubic
from slimbench.methods.core.learning.hooks import Hooks
from slimbench.methods.core.masks import across
from slimbench.methods.pruning.gates.nested import Nest

_WRITTEN = "written/"


class Salience(Hooks):
    """Masks of structures and ranks of adapters.

    Attributes:
        averages: S̄ [count] of each kind, by the full name of the layer that reads it, and `hidden` [features], if features go; so are
            `gates`, 0..1, and `gone`.
        ranks: Of each adapter, how many rows of A and columns of B take part; the others are not updated, and those of B are zero.
        teacher: A and B of each adapter as they were when pruning began.
        step: The one that is on.
    """

    def __init__(
        self,
        beside: Beside,
        kinds: Mapping[str, Structures],
        wanted: int,
        growth: Cubic,
        memory: float,
        fade: float,
        rank: int,
        nest: Nest | None = None,
    ) -> None:
        """Masks are open, and ranks as small as they ever are.

        Args:
            beside: Adapters of the largest rank.
            wanted: Parameters of structures that go in the end.
            growth: What share of them goes after a step; the rest of the ranks takes part by and by over the same steps.
            memory: β.
            fade: By how much a mask moves in a step.
            rank: Of all adapters at first.
            nest: The same kinds and the stream, of which features go too; None: they stay.
        """
        self.beside, self.kinds, self.wanted, self.growth, self.memory, self.fade = beside, dict(kinds), wanted, growth, memory, fade
        self.nest = nest
        self.first, self.most = rank, len(next(iter(beside.pairs.values()))[0])
        ones = {name: torch.ones(kind.count, device=kind.reads.weight.device) for name, kind in kinds.items()}
        if nest is not None:
            ones["hidden"] = torch.ones(nest.stream.width, device=nest.stream.head.weight.device)
        self.gates = {name: values.clone() for name, values in ones.items()}
        self.averages = {name: torch.zeros_like(values) for name, values in ones.items()}
        self.gone = {name: torch.zeros_like(values, dtype=torch.bool) for name, values in ones.items()}
        self.ranks = dict.fromkeys(beside.pairs, rank)
        self.importance = dict.fromkeys(beside.pairs, 0.0)
        self.teacher = self._copied()
        self.step = 0
        self.seen: dict[str, list[Tensor]] = {}
        self.names = {layer: name for name, layer in beside.layers.items()}
        self.placed = [kind.reads.register_forward_pre_hook(self._read(name)) for name, kind in kinds.items()]
        if nest is not None:
            self.placed += [kind.reads.register_forward_hook(self._written(name)) for name, kind in kinds.items()]

    def _copied(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (first.detach().clone(), second.detach().clone()) for name, (first, second) in self.beside.pairs.items()}

    def _see(self, name: str, x: Tensor) -> None:
        """Sum up the magnitudes of inputs or outputs of a layer and of their gradients, and themselves, over the tokens of a step."""
        if not torch.is_grad_enabled():
            return
        flat = x.detach().flatten(0, -2).float()
        held = self.seen.setdefault(name, [torch.zeros(flat.shape[1], device=flat.device) for _ in range(3)] + [torch.zeros(())])
        held[0] += flat.abs().sum(0)
        held[1] += flat.sum(0)
        held[3] += len(flat)

        def add(gradient: Tensor) -> None:
            held[2] += gradient.flatten(0, -2).float().abs().sum(0)

        x.register_hook(add)

    def _read(self, name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda _, args: self._see(name, args[0])

    def _written(self, name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        return lambda _, args, made: self._see(_WRITTEN + name, made)

    def finish(self) -> None:
        """Look at no more inputs."""
        for handle in self.placed:
            handle.remove()

    def salience(self, name: str) -> Tensor:
        """Ŝ [count] of the structures of a kind, of the step that is on."""
        kind, (sizes, _, gradients, _) = self.kinds[name], self.seen[name]
        found = (sizes * gradients).view(kind.count, -1).sum(1)
        for layer in kind.makes:
            if (adapter := self.names.get(layer)) is not None:
                second = self.beside.pairs[adapter][1]
                assert second.grad is not None
                found += self.beside.scale * (second.detach() * second.grad).abs().view(kind.count, -1).sum(1)
        return found + outliers(self._outputs(name).T.reshape(kind.count, -1))

    def features(self) -> Tensor:
        """Ŝ [features] of the stream, of the step that is on."""
        found = torch.zeros_like(self.averages["hidden"])
        for name in self.kinds:
            sizes, _, gradients, _ = self.seen[_WRITTEN + name]
            found += (sizes * gradients + outliers(self._outputs(name))).to(found.device)
        return found

    def _outputs(self, name: str) -> Tensor:
        """What each input gives to each output of the layer that reads a kind, of the mean of the inputs, [out, in]."""
        _, sums, _, tokens = self.seen[name]
        return self.kinds[name].reads.weight.detach().float() * (sums / tokens.to(sums.device))

    @contextmanager
    def masked(self) -> Iterator[None]:
        """Structures multiplied by their masks for a while."""
        with multiplied(self.kinds, self.gates) if self.nest is None else self.nest.applied(self.gates):
            yield

    def after_backward(self, step: int) -> None:
        for name, average in self.averages.items():
            found = self.salience(name) if name in self.kinds else self.features()
            average.mul_(self.memory).add_(found, alpha=1 - self.memory)
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

    def chosen(self, wanted: int) -> dict[str, Tensor]:
        """The structures that go for so many parameters, those of the lowest S̄ per parameter, as masks.

        Raises:
            Unsupported: One structure of each kind stays, and all others do not hold so many.
        """
        if self.nest is None:
            return cheapest({name: values / price(self.kinds[name]) for name, values in self.averages.items()}, self.kinds, wanted)
        held = prices(self.nest, self.gone)
        return fewest({name: values / held[name] for name, values in self.averages.items()}, self.nest, wanted)

    def grow(self, done: int, before: int) -> None:
        """Let the ranks of the more important half of the adapters grow.

        Args:
            before: The step after which that was done last.
        """
        order = sorted(self.importance, key=lambda name: -self.importance[name])
        for name in order[: len(order) // 2]:
            self.ranks[name] = min(self.most, int(self.ranks[name] * self.budget(done) / self.budget(before) + 1e-9))

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        done, growth = step + 1, self.growth
        if done == growth.begin:
            self.teacher = self._copied()
        if growth.begin < done <= growth.end:
            if wanted := round(growth.at(done) * self.wanted):
                self.gone = self.chosen(wanted)
            every = max(1, (growth.end - growth.begin) // 4)
            if done == growth.end or (done - growth.begin) % every == 0:
                self.grow(done, max(growth.begin, growth.begin + (done - 1 - growth.begin) // every * every))
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


def prices(nest: Nest, gone: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters that each structure holds, by how much they would be fewer without it, where others have gone already."""
    stays = {name: (~mask).double().requires_grad_(True) for name, mask in gone.items()}
    with torch.enable_grad():
        found = torch.autograd.grad(nest.size(stays), list(stays.values()))
    return dict(zip(stays, found, strict=True))


def fewest(densities: Mapping[str, Tensor], nest: Nest, wanted: int) -> dict[str, Tensor]:
    """As few structures as hold so many parameters together, those of the lowest densities, as masks, by bisection.

    Of each kind, and of the features, the one of the highest density stays.

    Args:
        densities: [count] of each kind, and `hidden` [features].

    Raises:
        Unsupported: All others do not hold so many.
    """
    free = {name: values.index_fill(0, values.argmax(), torch.inf) for name, values in densities.items()}

    def lost(count: int) -> int:
        return nest.total - round(float(nest.size({name: (~mask).double() for name, mask in across(free, count).items()})))

    low, high = 0, sum(len(values) - 1 for values in free.values())
    if lost(high) < wanted:
        raise Unsupported(
            f"one hidden feature, and one group of heads and one channel in each block, leave {lost(high)} parameters to prune,"
            f" fewer than {wanted}"
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if lost(middle) >= wanted else (middle + 1, high)
    return across(free, low)


def outliers(values: Tensor) -> Tensor:
    """√max(0, Kurt) of values [n, count] along the last dimension, [n]."""
    return kurtosis(values).clamp_min(0).sqrt()


def kurtosis(values: Tensor) -> Tensor:
    """Mean fourth power of standardized values [n, count] along the last dimension, less the 3 that a normal law has: [n]."""
    deviation = values.std(1, keepdim=True).clamp_min(1e-30)
    return ((values - values.mean(1, keepdim=True)) / deviation).pow(4).mean(1) - 3
