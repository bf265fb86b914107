"""Units inside of heads: dimensions of values, with the columns of the output projection that read them, and channels beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimbench.methods.core.architecture.anatomy import Block
from slimbench.methods.core.architecture.surgery import name_of
from slimbench.methods.core.architecture.units import head_groups, price, structures
from slimbench.methods.formats.architecture.edits import Kept, apply


@dataclass(frozen=True)
class Units:
    """All units of a kind in a block.

    Attributes:
        reads: The layer whose inputs the units make.
        groups: Of units that are regarded together: key and value heads, 1 of channels.
        width: Units of a group.
        repeats: Runs of inputs that a group makes: a dimension of a value is read once for each query head that shares it.
        price: Parameters that go with a unit.
        frame: Parameters that go with a group of which no unit is left, beside those of the units.
    """

    block: Block
    reads: nn.Linear
    groups: int
    width: int
    repeats: int
    price: int
    frame: int

    @property
    def count(self) -> int:
        """How many units there are."""
        return self.groups * self.width

    def of_inputs(self, values: Tensor) -> Tensor:
        """Sums [count] over the inputs [in] that each unit makes."""
        return values.view(self.groups, self.repeats, self.width).sum(1).flatten()

    def to_inputs(self, values: Tensor) -> Tensor:
        """Values [count] of units for each input [in] that they make."""
        return values.view(self.groups, 1, self.width).expand(-1, self.repeats, -1).flatten()

    def left(self, gone: Tensor) -> int:
        """Parameters without the units of a mask [count]."""
        kept = (~gone).view(self.groups, self.width)
        return self.price * int(kept.sum()) + self.frame * int(kept.any(1).sum())


def units_of(block: Block) -> dict[str, Units]:
    """Dimensions of values and channels of a block, by the full name of the layer that reads them.

    Raises:
        Unsupported: A norm couples all heads, or there are experts.
    """
    heads, channels = structures(block)
    attention = block.attention
    values = attention.v.weight.shape[1] + (attention.v.bias is not None)
    dimension = values + attention.repeats * attention.out.out_features
    frame = price(heads) - dimension * attention.head_dim
    found = (
        Units(block, attention.out, attention.groups, attention.head_dim, attention.repeats, dimension, frame),
        Units(block, block.mlp.down, 1, channels.count, 1, price(channels), 0),
    )
    return {block.name_of(kind.reads): kind for kind in found}


@contextmanager
def masked(kinds: Mapping[str, Units], gone: Mapping[str, Tensor]) -> Iterator[None]:
    """Give zero in the place of what units of masks [count] make, for a while."""

    def hide(keep: Tensor, _: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] * keep.to(args[0].dtype),)

    placed = [kind.reads.register_forward_pre_hook(partial(hide, kind.to_inputs((~gone[name]).float()))) for name, kind in kinds.items()]
    try:
        yield
    finally:
        for hook in placed:
            hook.remove()


@torch.no_grad()
def cut(model: Any, kinds: Mapping[str, Units], gone: Mapping[str, Tensor]) -> None:
    """Take units out of a model, in place: channels and whole groups of heads, and dimensions of the values of others."""
    for name, kind in kinds.items():
        kept = (~gone[name]).view(kind.groups, kind.width)
        if kind.reads is kind.block.attention.out:
            groups = kept.any(1)
            if not bool(groups.all()):
                head_groups(kind.block).cut(model, groups.nonzero().squeeze(1))
            _thin(model, kind, kept[groups])
        elif not bool(kept.all()):
            structures(kind.block)[1].cut(model, kept.flatten().nonzero().squeeze(1))


def _thin(model: Any, kind: Units, kept: Tensor) -> None:
    """Leave some dimensions of values alone, kept [groups, width]; there are no other groups."""
    if bool(kept.all()):
        return
    values, out = kind.block.attention.v, kind.block.attention.out
    places = kept.flatten().nonzero().squeeze(1)
    inputs = kept.unsqueeze(1).expand(-1, kind.repeats, -1).flatten().nonzero().squeeze(1)
    rows, columns = values.weight[places].clone(), out.weight[:, inputs].clone()
    bias = None if values.bias is None else values.bias[places].clone()
    apply(model, Kept(name_of(model, values), "outputs", len(places)))
    apply(model, Kept(name_of(model, out), "inputs", len(inputs)))
    values.weight.copy_(rows)
    out.weight.copy_(columns)
    if bias is not None:
        values.bias.copy_(bias)
    for layer, held in ((values, places), (out, inputs)):
        buffer: Any = layer.kept
        buffer.copy_(held)
