"""Masks within masks: on the features of the residual stream, on attentions and MLPs or whole blocks, and on heads and channels in them.

A weight of a unit stays if the unit, the part that it is in and the feature that it reads or writes do. With their shares or
probabilities p of staying, the expected size of all units is (Xia et al., arXiv 2204.00408, appendix A)

    Σ_features Σ_blocks Σ_units  p_feature · p_part · p_unit · (weights of a unit / features)

and the biases of units, which belong to no feature, are counted without p_feature. Norms, embeddings and the biases of what writes the
stream are not counted. With all p 0 or 1 this is the number of parameters that units have after a cut.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from slimbench.methods.base import Unsupported
from slimbench.methods.core.architecture.anatomy import anatomy
from slimbench.methods.core.architecture.surgery import remove_part
from slimbench.methods.core.architecture.units import Structures, cheapest, price, structures
from slimbench.methods.core.learning.gates import HardConcrete, Lagrangian, Pace, multiplied, spread
from slimbench.methods.core.masks import lowest
from slimbench.methods.pruning.gates.stream import stream_of

PARTS: dict[str, Literal["attention", "mlp"]] = {"head_groups": "attention", "channels": "mlp"}
"""What the units of a kind are in."""
_FARTHEST = (math.log(0.01), math.log(100.0))  # α is held between these, as in the program of CoFi


class Nest:
    """The units of a model, the parts that they are in, and the features of the stream.

    Values of masks go by the full name of the layer that reads the units, [count]; `attention`, `mlp` or, for both of them, `blocks`,
    [blocks]; and `hidden`, [features]. What is not among them is whole.

    Attributes:
        kinds: Units of each kind, by the name of the layer that reads them.
        places: The block of each kind, as its full name and its index.
    """

    def __init__(self, model: Any) -> None:
        """Look into a model.

        Raises:
            Unsupported: It is not built like Llama and OPT, or has experts, or attentions of several kinds.
        """
        self.kinds: dict[str, Structures] = {}
        self.places: dict[str, tuple[str, int]] = {}
        for index, block in enumerate(anatomy(model)):
            for kind in structures(block):
                name = block.name_of(kind.reads)
                self.kinds[name], self.places[name] = kind, (block.name, index)
        self.stream = stream_of(model)

    @property
    def blocks(self) -> int:
        """How many there are."""
        return 1 + max(index for _, index in self.places.values())

    @property
    def total(self) -> int:
        """Parameters of all units."""
        return sum(price(kind) * kind.count for kind in self.kinds.values())

    def part(self, values: Mapping[str, Tensor], name: str) -> Tensor | None:
        """The value of the part that units of a kind are in, a scalar."""
        found = values.get("blocks", values.get(PARTS[self.kinds[name].name]))
        return None if found is None else found[self.places[name][1]]

    def size(self, stays: Mapping[str, Tensor]) -> Tensor:
        """Expected parameters of all units, a scalar, of the probabilities that things stay."""
        sizes = []
        for name, kind in self.kinds.items():
            biases = sum(layer.bias.numel() for layer in kind.makes if layer.bias is not None) // kind.count
            each, inside = price(kind) - biases, self.part(stays, name)
            one = each * stays["hidden"].mean() + biases if "hidden" in stays else each + biases
            sizes.append(one * stays[name].sum() * (1 if inside is None else inside))
        return torch.stack(sizes).sum()

    @contextmanager
    def applied(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Multiply units, parts and features for a while; gradients flow to the values."""

        def written(z: Tensor, _: Any, args: tuple[Tensor], made: Tensor) -> Tensor:
            return made * z.to(made.dtype)

        with ExitStack() as stack:
            for name, kind in self.kinds.items():
                if (inside := self.part(values, name)) is not None:
                    stack.callback(kind.reads.register_forward_hook(partial(written, inside)).remove)
            stack.enter_context(multiplied(self.kinds, {name: values[name] for name in self.kinds}))
            if "hidden" in values:
                stack.enter_context(self.stream.masked(values["hidden"]))
            yield

    @torch.no_grad()
    def fold(self, values: Mapping[str, Tensor]) -> None:
        """Multiply the values into the weights of the layers that read units and of those on the stream, in place."""
        for name, kind in self.kinds.items():
            kind.reads.weight.mul_(spread(values[name], kind))
            if (inside := self.part(values, name)) is not None:
                for tensor in kind.reads.parameters():
                    tensor.mul_(inside)
        if "hidden" in values:
            self.stream.fold(values["hidden"])

    @torch.no_grad()
    def carve(
        self, model: Any, wanted: int, values: Mapping[str, Tensor], scores: Mapping[str, Tensor], parts: Collection[str], features: Tensor
    ) -> dict[str, Tensor]:
        """Multiply the values into the weights, and cut so many parameters of units, in place.

        First go parts and features, then as many units as it takes, those of the lowest scores; of each kind in each part one stays.

        Args:
            scores: Of units, by kind; compared across all of them.
            parts: Names of the kinds that go whole, with what they are in.
            features: Those of the stream that go, a mask [features].

        Returns:
            The values, zero where something has gone.
        """
        final, left = {name: value.detach().clone() for name, value in values.items()}, dict(self.kinds)
        wanted -= self.total
        self.fold(final)
        for name in parts:
            (block, index), part = self.places[name], PARTS[left.pop(name).name]
            remove_part(model, block, part)
            final[part][index] = 0.0
        if bool(features.any()):
            self.stream.cut(model, (~features).nonzero().squeeze(1))
            final["hidden"][features] = 0.0
        wanted += sum(price(kind) * kind.count for kind in left.values())
        for name, gone in cheapest({name: scores[name] for name in left}, left, wanted).items() if wanted > 0 else ():
            final[name][gone] = 0.0
            if bool(gone.any()):
                left[name].cut(model, (~gone).nonzero().squeeze(1))
        return final

    def held(self, final: Mapping[str, Tensor]) -> int:
        """Parameters of units that a carved model has, counted in its tensors."""
        tensors = 0
        for name, kind in self.kinds.items():
            inside = self.part(final, name)
            if inside is None or bool(inside):
                tensors += kind.reads.weight.numel() + sum(p.numel() for layer in kind.makes for p in layer.parameters())
        return tensors

    def told(self, final: Mapping[str, Tensor]) -> dict[str, Any]:
        """What a claim says of what is left, of the values that `carve` returns."""
        found: dict[str, Any] = {"head_groups_by_block": [], "channels_by_block": []}
        for name, kind in self.kinds.items():
            inside = self.part(final, name)
            found[f"{kind.name}_by_block"].append(0 if inside is not None and not bool(inside) else int((final[name] != 0).sum()))
        return found | ({"hidden": int((final["hidden"] != 0).sum())} if "hidden" in final else {})


class NestedGates(Lagrangian):
    """A gate for each unit and each feature, and for each part or block, under one budget.

    Attributes:
        nest: Gates go by the names of its masks.
        whole: Parameters of all units before anything is cut.
    """

    def __init__(
        self, model: Any, share: float, pace: Pace, parts: tuple[str, ...] = ("attention", "mlp"), law: HardConcrete | None = None
    ) -> None:
        """Open gates.

        Args:
            share: Of the parameters of units.
            parts: Which gates of parts there are.
        """
        self.nest = Nest(model)
        self.whole = self.nest.total
        sizes = {name: kind.count for name, kind in self.nest.kinds.items()}
        sizes |= dict.fromkeys(parts, self.nest.blocks) | {"hidden": self.nest.stream.width}
        super().__init__({name: (size,) for name, size in sizes.items()}, self.nest.stream.head.weight.device, share, pace, law)

    def stays(self) -> dict[str, Tensor]:
        """P(z ≠ 0) of all gates."""
        return {name: self.law.stays(alpha) for name, alpha in self.alphas.items()}

    def gone(self) -> Tensor:
        return 1 - self.nest.size(self.stays()) / self.whole

    @contextmanager
    def applied(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        with self.nest.applied(values):
            yield

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        with torch.no_grad():
            for alpha in () if self.fixed else self.alphas.values():
                alpha.clamp_(*_FARTHEST)
        super().after_step(step, optimizer)

    def units(self, wanted: int) -> dict[str, Tensor]:
        """The heads and channels of the lowest α that hold so many parameters, as masks by kind.

        Raises:
            Unsupported: There are not so many.
        """
        return cheapest({name: self.alphas[name].detach() for name in self.nest.kinds}, self.nest.kinds, wanted)

    def values(self) -> dict[str, Tensor]:
        """What all things are multiplied by that stay."""
        return {name: self.law.folded(alpha.detach()) for name, alpha in self.alphas.items()}

    @torch.no_grad()
    def finish(self, model: Any, wanted: int) -> dict[str, Tensor]:
        """Cut so many parameters of units out of a model, in place, and return the final values of the masks.

        Parts go whose P(z ≠ 0) is below one half, and as many features as are expected to, those of the lowest P(z ≠ 0), as far as the
        budget holds them; heads and channels make up the rest, in the order of their own probability times that of their part. One
        attention and one MLP stay.
        """
        stays, left = self.stays(), wanted
        parts = [name for name in self._rising(stays) if float(self._inside(stays, name)) < 0.5]
        chosen: list[str] = []
        for name in parts:
            kind = self.nest.kinds[name]
            alike = [other for other, of in self.nest.kinds.items() if of.name == kind.name and other not in chosen]
            if len(alike) > 1 and price(kind) * kind.count <= left:
                chosen.append(name)
                left -= price(kind) * kind.count
        features = lowest(stays["hidden"], self._features(stays, chosen, left))
        scores = {name: stays[name] * self._inside(stays, name) for name in self.nest.kinds}
        return self.nest.carve(model, wanted, self.values(), scores, chosen, features)

    def _features(self, stays: Mapping[str, Tensor], parts: Collection[str], left: int) -> int:
        """How many features go: as many as are expected to, but no more than `left` parameters have room for."""
        width = self.nest.stream.width
        weights = sum(
            kind.count * price(kind) - sum(layer.bias.numel() for layer in kind.makes if layer.bias is not None)
            for name, kind in self.nest.kinds.items()
            if name not in parts
        )
        return min(round(float((1 - stays["hidden"]).sum())), left // (weights // width), width - 1)

    def _inside(self, values: Mapping[str, Tensor], name: str) -> Tensor:
        found = self.nest.part(values, name)
        return torch.ones(()) if found is None else found

    def _rising(self, stays: Mapping[str, Tensor]) -> list[str]:
        """Kinds in the order in which their parts are likely to go."""
        return sorted(self.nest.kinds, key=lambda name: float(self._inside(stays, name)))


def check_parts(model: Any) -> None:
    """Raise `Unsupported` if an attention could not be taken out, since attentions are of different kinds."""
    if len(set(getattr(model.config, "layer_types", None) or [None])) > 1:
        raise Unsupported(f"the attentions of {type(model).__name__} are of different kinds, and each kind has its place in the cache")
