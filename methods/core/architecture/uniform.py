"""Cutting all blocks of a model to the same sizes, so that it stays an ordinary checkpoint with other numbers in its config.

The parameters of such a model are a sum of products of its sizes, each tensor one summand:

    outside · hidden + blocks · (hidden · (a · groups + c · channels + n) + bias terms)

A size that the config of a model cannot say, or from which its class would make other tensors, is refused (`check`) before anything
is cut: some classes want the hidden size to be a multiple of the number of heads, in some it is the width of all heads together.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slimbench.methods.base import Unsupported
from slimbench.methods.core.architecture.anatomy import anatomy
from slimbench.methods.core.architecture.surgery import keep
from slimbench.methods.core.architecture.units import Structures, structures
from slimbench.methods.formats.architecture.structure import blocks_of

Axis = Literal["blocks", "hidden", "groups", "channels"]

_FIELDS: dict[Axis, tuple[str, ...]] = {
    "hidden": ("hidden_size", "word_embed_proj_dim"),
    "groups": ("num_key_value_heads",),
    "channels": ("intermediate_size", "ffn_dim"),
}
"""Where configs say a size, so far as they hold it: a field of such a name with another number means something else."""


@dataclass(frozen=True)
class Sizes:
    """What all blocks of a model have in common.

    Attributes:
        blocks: Decoder blocks.
        hidden: Features of a hidden state.
        groups: Key and value heads of a block; each has the same number of query heads.
        channels: Of an MLP.
    """

    blocks: int
    hidden: int
    groups: int
    channels: int


@dataclass(frozen=True)
class Kept:
    """Indices, rising, of what stays.

    Attributes:
        hidden: Features of the hidden states, the same in the whole model.
        groups: Groups of heads, for each block.
        channels: For each block.
    """

    hidden: Tensor
    groups: Sequence[Tensor]
    channels: Sequence[Tensor]

    @classmethod
    def first(cls, sizes: Sizes) -> Kept:
        """The first of each."""
        groups, channels = torch.arange(sizes.groups), torch.arange(sizes.channels)
        return cls(torch.arange(sizes.hidden), [groups] * sizes.blocks, [channels] * sizes.blocks)


def sizes_of(model: Any) -> Sizes:
    """The sizes of a model.

    Raises:
        Unsupported: They differ between its blocks, or it is not built like Llama and OPT.
    """
    found = {(block.attention.q.in_features, block.attention.groups, block.mlp.down.in_features) for block in anatomy(model)}
    if len(found) > 1:
        raise Unsupported(f"the blocks of {type(model).__name__} have {len(found)} different sizes")
    return Sizes(len(blocks_of(model)), *found.pop())


def growth(model: Any) -> Counter[tuple[Axis, ...]]:
    """How the parameters of a model grow: how many there are for one of each of some axes. What is shared counts once."""
    sizes, block, found = asdict(sizes_of(model)), anatomy(model)[0], Counter[tuple[Axis, ...]]()
    heads, mlp = structures(block)
    kinds: tuple[tuple[Structures, Axis], ...] = ((heads, "groups"), (mlp, "channels"))

    def add(tensor: Tensor | None, *axes: Axis) -> None:
        if tensor is not None:
            found[axes] += tensor.numel() // math.prod(sizes[axis] for axis in axes if axis != "blocks")

    for kind, axis in kinds:
        for layer in kind.makes:
            add(layer.weight, "blocks", "hidden", axis)
            add(layer.bias, "blocks", axis)
        add(kind.reads.weight, "blocks", "hidden", axis)
        add(kind.reads.bias, "blocks", "hidden")
    for norm in block.norms:
        for parameter in norm.parameters():
            add(parameter, "blocks", "hidden")
    for norm in block.attention.norms:
        for parameter in norm.parameters():
            add(parameter, "blocks")
    for tensor, dim in _outside(model).values():
        add(tensor, *(() if dim is None else ("hidden",)))
    return found


def parameters(grown: Mapping[tuple[Axis, ...], int], sizes: Sizes) -> int:
    """Parameters of a model of other sizes that grows so."""
    return sum(count * math.prod(getattr(sizes, axis) for axis in axes) for axes, count in grown.items())


def check(model: Any, sizes: Sizes) -> None:
    """Raise `Unsupported`, in one line, unless an ordinary checkpoint of the model's class can have the sizes; no data is touched.

    Args:
        sizes: As many blocks as the model has.
    """
    from huggingface_hub.errors import StrictDataclassError

    name = f"{sizes.groups * anatomy(model)[0].attention.repeats} heads, hidden size {sizes.hidden}, {sizes.channels} channels"
    if sizes.hidden != sizes_of(model).hidden and type(model.get_input_embeddings()) is not nn.Embedding:
        raise Unsupported(f"{type(model).__name__} scales its embeddings by a hidden size that cannot be {sizes.hidden}")
    try:
        wanted = _shapes(_skeleton(_config(model, _fields(model, sizes))))
    except (ValueError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise Unsupported(f"{type(model).__name__} cannot have {name}: {reason}") from error
    trial = _skeleton(_config(model, {}))
    _cut(trial, Kept.first(sizes))
    if _shapes(trial) != wanted:
        raise Unsupported(f"an ordinary {type(model).__name__} cannot have {name}: its config makes other tensors of them")


def narrow(model: Any, kept: Kept) -> None:
    """Leave only what is kept, in place; the config then says the sizes that are left, and the model needs no edits.

    Raises:
        Unsupported: It is no ordinary model with these sizes, see `check`.
    """
    blocks = len(blocks_of(model))
    sizes = Sizes(blocks, len(kept.hidden), len(kept.groups[0]), len(kept.channels[0]))
    check(model, sizes)
    fields = _fields(model, sizes)
    _cut(model, kept)
    for field, value in fields.items():
        setattr(model.config, field, value)
    del model.edits, model.config_before


@torch.no_grad()
def _cut(model: Any, kept: Kept) -> None:
    width = sizes_of(model).hidden
    for block, groups, channels in zip(anatomy(model), kept.groups, kept.channels, strict=True):
        heads, mlp = structures(block)
        heads.cut(model, groups)
        mlp.cut(model, channels)
        if len(kept.hidden) < width:
            for layer, name in ((layer, block.name_of(layer)) for layer in (*heads.makes, *mlp.makes, heads.reads, mlp.reads)):
                writes = layer in (heads.reads, mlp.reads)
                keep(model, f"{name}.weight", kept.hidden, width, 0 if writes else 1)
                if writes and layer.bias is not None:
                    keep(model, f"{name}.bias", kept.hidden, width, 0)
            for norm in block.norms:
                for leaf, _ in list(norm.named_parameters()):
                    keep(model, f"{block.name_of(norm)}.{leaf}", kept.hidden, width, 0)
    if len(kept.hidden) < width:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        tied = head.weight is embedding.weight
        for name, (_, dim) in _outside(model).items():
            if dim is not None:
                keep(model, name, kept.hidden, width, dim)
        if tied:
            head.weight, head.in_features = embedding.weight, len(kept.hidden)


def _outside(model: Any) -> dict[str, tuple[Tensor, int | None]]:
    """Parameters outside the blocks, and the last of their dimensions that has the hidden size."""
    width, inside = model.config.hidden_size, tuple(f"{name}." for name in blocks_of(model))
    found: dict[str, tuple[Tensor, int | None]] = {}
    for name, tensor in model.named_parameters():
        if not name.startswith(inside):
            dims = [dim for dim, size in enumerate(tensor.shape) if size == width]
            found[name] = (tensor, dims[-1] if dims else None)
    return found


def _fields(model: Any, sizes: Sizes) -> dict[str, int]:
    """What the config must say for other sizes."""
    config, before, attention = model.config, asdict(sizes_of(model)), anatomy(model)[0].attention
    after = asdict(sizes)
    found = {field: after[axis] for axis, fields in _FIELDS.items() for field in fields if getattr(config, field, None) == before[axis]}
    found["num_attention_heads"] = sizes.groups * attention.repeats
    if hasattr(config, "head_dim") or sizes.hidden != found["num_attention_heads"] * attention.head_dim:
        found["head_dim"] = attention.head_dim
    return found


def _config(model: Any, fields: Mapping[str, int]) -> Any:
    return type(model.config).from_dict(model.config.to_dict() | fields)


def _skeleton(config: Any) -> Any:
    """The model of a config without data."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config)


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
