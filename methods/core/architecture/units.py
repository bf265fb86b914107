"""Units of a block: weights that hang together, so that they stay or go as one.

In a block like those of Llama and OPT these weights depend on each other:

    channel     a row of up, and of gate if there is one, and the column of down that reads what they make
    heads       a key and a value head with the query heads that share them, and the columns of the output projection that read these

The biases of rows go with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import Unsupported

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slimbench.methods.core.architecture.anatomy import Block


@dataclass(frozen=True)
class Structures:
    """All structures of a kind in a block: the i-th one is the i-th run of rows of `makes` and the i-th run of columns of `reads`."""

    name: str
    count: int
    makes: tuple[nn.Linear, ...]
    reads: nn.Linear

    def scores(self, importance: dict[nn.Linear, Tensor], aggregate: Literal["sum", "max", "last"]) -> Tensor:
        """Importance of each structure [count], from that of the weights [out, in] of the layers."""
        import torch

        rows = [importance[layer].view(self.count, -1).sum(1) for layer in self.makes]
        columns = importance[self.reads].T.reshape(self.count, -1).sum(1)
        parts = torch.stack([*rows, columns])
        return {"sum": parts.sum(0), "max": parts.amax(0), "last": columns}[aggregate]

    def cut(self, model: Any, chosen: Tensor) -> None:
        """Leave only some structures, in place."""
        from slimbench.methods.core.architecture.surgery import keep, name_of

        for layer in self.makes:
            keep(model, f"{name_of(model, layer)}.weight", chosen, self.count, 0)
            if layer.bias is not None:
                keep(model, f"{name_of(model, layer)}.bias", chosen, self.count, 0)
        keep(model, f"{name_of(model, self.reads)}.weight", chosen, self.count, 1)


def head_groups(block: Block) -> Structures:
    """The groups of heads of a block.

    Raises:
        Unsupported: A norm couples all heads.
    """
    attention = block.attention
    if attention.joined:
        raise Unsupported(f"{type(block.module).__name__} has a norm over all heads together, which change if one goes")
    return Structures("head_groups", attention.groups, (attention.q, attention.k, attention.v), attention.out)


def structures(block: Block) -> list[Structures]:
    """The kinds of coupled structures of a block: its groups of heads and its channels.

    Raises:
        Unsupported: A norm couples all heads, or there are experts.
    """
    mlp = block.mlp
    return [head_groups(block), Structures("channels", mlp.down.in_features, mlp.makes, mlp.down)]


def kinds_of(model: Any) -> dict[str, Structures]:
    """The groups of heads and the channels of all blocks, by the full name of the layer that reads them.

    Raises:
        Unsupported: The model is not built like Llama and OPT, or has experts.
    """
    from slimbench.methods.core.architecture.anatomy import anatomy

    return {block.name_of(kind.reads): kind for block in anatomy(model) for kind in structures(block)}


def price(kind: Structures) -> int:
    """Parameters that go with one structure."""
    makes = sum(parameter.numel() for layer in kind.makes for parameter in layer.parameters())
    return (makes + kind.reads.weight.numel()) // kind.count


def cheapest(scores: Mapping[str, Tensor], kinds: Mapping[str, Structures], wanted: int, biased: bool = False) -> dict[str, Tensor]:
    """The structures with the lowest scores that hold so many parameters together, as masks [count] by the layer that reads them.

    Of each kind the one with the highest score stays.

    Args:
        scores: [count] of each kind, by the name of the layer that reads it; lower ones go first.
        kinds: By the same names.
        wanted: Parameters.
        biased: A layer without a bias that loses a structure gets one, which is taken from what has gone.

    Raises:
        Unsupported: All others do not hold so many.
    """
    import torch

    from slimbench.methods.core.masks import across

    free = {name: values.index_fill(0, values.argmax(), torch.inf) for name, values in scores.items()}
    held, owners = [], []
    for index, kind in enumerate(kinds.values()):
        held.append(torch.full((kind.count,), price(kind)))
        owners.append(torch.full((kind.count,), index))
    order = torch.cat(list(free.values())).cpu().argsort(stable=True)
    lost, owner = torch.cat(held)[order], torch.cat(owners)[order]
    for index, kind in enumerate(kinds.values()):
        if biased and kind.reads.bias is None:
            lost[(owner == index).nonzero()[0]] -= kind.reads.out_features
    total = lost[: len(lost) - len(kinds)].cumsum(0)
    count = int((total < wanted).sum()) + 1
    if count > len(total):
        most = int(total[-1]) if len(total) else 0
        raise Unsupported(f"one group of heads and one channel in each block leave {most} parameters to prune, fewer than {wanted}")
    return across(free, count)


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` units of the highest scores [units], in their order; of equal scores the later unit stays."""
    from slimbench.methods.core.masks import lowest

    return (~lowest(scores, len(scores) - count)).nonzero().squeeze(1)
