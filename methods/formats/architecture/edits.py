"""Edits of an architecture: each changes a model in place, and can be written down and made again on a model without data.

`apply` makes an edit and notes it on the model, in `model.edits`; `describe_edits` and `replay` write and read the notes. What becomes of
the numbers is the affair of who edits (`methods.core.architecture.surgery`): an edit leaves new tensors empty.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from slimbench.methods.base import EDITED, Unsupported
from slimbench.methods.formats.architecture.layout import LLAMA, layout_of
from slimbench.methods.formats.architecture.modules import (
    Bottleneck,
    Extended,
    FactorPair,
    FactorPairPlus,
    Fusion,
    KeptInputs,
    KeptLogits,
    KeptOutputs,
    KeptRows,
    NoAttention,
    Nothing,
    ShortcutBlock,
    mix,
)
from slimbench.methods.formats.architecture.structure import blocks_of

SCHEMA = 1
DESCRIPTION = f"{EDITED}.json"
_BY_BLOCK = ("layer_types", "no_rope_layers", "mlp_layer_types", "attention_layers")
"""Fields of a config that hold one entry for each block."""


class Edit(ABC):
    """A change of an architecture, by full names of modules and tensors as they are before it."""

    name: ClassVar[str]

    @abstractmethod
    def apply(self, model: Any) -> None:
        """Make the change in place.

        Raises:
            Unsupported: The model is not built so that it could be made.
        """


@dataclass(frozen=True)
class Resize(Edit):
    """Another size of a parameter: of a linear layer, a norm, an embedding, a router or stacked experts."""

    name = "resize"
    tensor: str
    shape: tuple[int, ...]

    def apply(self, model: Any) -> None:
        owner, _, leaf = self.tensor.rpartition(".")
        module: Any = model.get_submodule(owner)
        held = dict(module.named_parameters(recurse=False)).get(leaf)
        if held is None or held.dim() != len(self.shape):
            raise Unsupported(f"{self.tensor} is no parameter of {len(self.shape)} dimensions")
        setattr(module, leaf, nn.Parameter(held.new_empty(self.shape), requires_grad=held.requires_grad))
        _tell_sizes(module, leaf, self.shape)
        _tell_heads(model.get_submodule(owner.rpartition(".")[0]))


@dataclass(frozen=True)
class AddBias(Edit):
    """A bias for a linear layer that has none."""

    name = "bias"
    module: str

    def apply(self, model: Any) -> None:
        layer = _linear(model, self.module)
        if layer.bias is not None:
            raise Unsupported(f"{self.module} has a bias already")
        layer.bias = nn.Parameter(layer.weight.new_empty(layer.out_features), requires_grad=layer.weight.requires_grad)


@dataclass(frozen=True)
class Factor(Edit):
    """Two linear layers in place of one: `X.reduce` [rank, in] and `X.expand` [out, rank], which has the bias."""

    name = "factor"
    module: str
    rank: int

    def apply(self, model: Any) -> None:
        layer = _linear(model, self.module)
        place = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        model.set_submodule(self.module, FactorPair(layer.in_features, self.rank, layer.out_features, layer.bias is not None, **place))


@dataclass(frozen=True)
class FactorPlus(Edit):
    """As `Factor`, with some rows of a weight beside it: `X.sparse` [rows, in], and `X.kept` [rows] says to which outputs they add."""

    name = "factor-plus"
    module: str
    rank: int
    rows: int

    def apply(self, model: Any) -> None:
        layer = _linear(model, self.module)
        sizes, place = (
            (layer.in_features, self.rank, layer.out_features, self.rows),
            {"device": layer.weight.device, "dtype": layer.weight.dtype},
        )
        model.set_submodule(self.module, FactorPairPlus(*sizes, layer.bias is not None, **place))


@dataclass(frozen=True)
class Kept(Edit):
    """A linear layer reads, or makes, some of its inputs or outputs alone, of which `X.kept` [count] tells the places; others are zero."""

    name = "kept"
    module: str
    side: Literal["inputs", "outputs"]
    count: int

    def apply(self, model: Any) -> None:
        layer, inputs = _linear(model, self.module), self.side == "inputs"
        width = layer.in_features if inputs else layer.out_features
        shape = (layer.out_features, self.count) if inputs else (self.count, layer.in_features)
        Resize(f"{self.module}.weight", shape).apply(model)
        if layer.bias is not None and not inputs:
            Resize(f"{self.module}.bias", (self.count,)).apply(model)
        layer.width = width
        layer.register_buffer("kept", torch.zeros(self.count, dtype=torch.int32, device=layer.weight.device))
        mix(layer, KeptInputs if inputs else KeptOutputs)


@dataclass(frozen=True)
class RemoveBlock(Edit):
    """One decoder block less; those after it, and their places in the cache, move up."""

    name = "remove-block"
    module: str

    def apply(self, model: Any) -> None:
        blocks = blocks_of(model)
        if self.module not in blocks or len(blocks) == 1:
            raise Unsupported(f"{type(model).__name__} has no block {self.module} that can be removed")
        if isinstance(blocks[self.module], ShortcutBlock):
            raise Unsupported(f"{self.module} stands between hidden states of different coordinates and cannot be left out")
        kept = [name != self.module for name in blocks]
        model.set_submodule(self.module.rpartition(".")[0], nn.ModuleList(b for b, keep in zip(blocks.values(), kept, strict=True) if keep))
        for entry in _BY_BLOCK:
            values = getattr(model.config, entry, None)
            if isinstance(values, list) and len(values) == len(kept):
                setattr(model.config, entry, [value for value, keep in zip(values, kept, strict=True) if keep])
        model.config.num_hidden_layers = len(kept) - 1
        _number_caches(model)


@dataclass(frozen=True)
class RemovePart(Edit):
    """The attention, or the MLP, of a block and the norm before it; the caches of later attentions move up."""

    name = "remove-part"
    module: str
    part: Literal["attention", "mlp"]

    def apply(self, model: Any) -> None:
        block: Any = model.get_submodule(self.module)
        norm, layers = _parts(block, self.part)
        if self.part == "attention" and len(set(getattr(model.config, "layer_types", None) or [None])) > 1:
            raise Unsupported(f"the attentions of {type(model).__name__} are of different kinds, and each kind has its place in the cache")
        setattr(block, norm, nn.Identity())
        if self.part == "attention":
            setattr(block, layers[0], NoAttention())
            _number_caches(model)
        else:
            *first, last = layers
            for layer in first:
                setattr(block, layer, nn.Identity())
            setattr(block, last, Nothing())


@dataclass(frozen=True)
class Insert(Edit):
    """A module that sees what another one gets (`before`), or what it gives (`after`); its tensors are `module.as_.…`.

    `kind` is `linear` (inputs, outputs, bias), `norm` (width, eps: RMS norm with a gain), `bottleneck` (width, size, activation) or
    `fusion` of so many of these (width, size, count, activation).
    """

    name = "insert"
    module: str
    as_: str
    kind: Literal["linear", "norm", "bottleneck", "fusion"]
    place: Literal["before", "after"]
    arguments: dict[str, Any] = field(default_factory=dict)

    def apply(self, model: Any) -> None:
        module: Any = model.get_submodule(self.module)
        if not self.as_.isidentifier() or hasattr(module, self.as_):
            raise Unsupported(f"{self.module} has no room for a module named {self.as_!r}")
        some = next(model.parameters())
        made = _MODULES[self.kind](**self.arguments, device=some.device, dtype=some.dtype)
        setattr(module, self.as_, made.requires_grad_(some.requires_grad))
        module.places = getattr(module, "places", {}) | {self.as_: self.place}
        mix(module, Extended)


@dataclass(frozen=True)
class Shortcuts(Edit):
    """A linear layer on each residual connection of a Llama-like block: `X.attention_shortcut` and `X.mlp_shortcut`, [out, in]."""

    name = "shortcuts"
    module: str
    attention: tuple[int, int]
    mlp: tuple[int, int]

    def apply(self, model: Any) -> None:
        block: Any = model.get_submodule(self.module)
        if layout_of(block).parts != LLAMA.parts:
            raise Unsupported(f"{type(block).__name__} has no residual connections as Llama has")
        some = next(block.parameters())
        for part, (outputs, inputs) in (("attention_shortcut", self.attention), ("mlp_shortcut", self.mlp)):
            layer = nn.Linear(inputs, outputs, bias=False, device=some.device, dtype=some.dtype)
            setattr(block, part, layer.requires_grad_(some.requires_grad))
        mix(block, ShortcutBlock)


@dataclass(frozen=True)
class Vocabulary(Edit):
    """Embedding and head keep the rows of some tokens; `rows` beside each weight says which row a token has, -1 for none.

    Token ids stay those of the tokenizer: a token without a row is read as the one of row 0, and is never predicted.
    """

    name = "vocabulary"
    kept: int

    def apply(self, model: Any) -> None:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if type(embedding) is not nn.Embedding or type(head) is not nn.Linear or head.bias is not None:
            raise Unsupported(f"{type(model).__name__} has no embedding and head of the usual classes")
        tied = head.weight is embedding.weight
        tokens = embedding.num_embeddings
        names = {module: name for name, module in model.named_modules() if module in (embedding, head)}
        for module, mixin in ((embedding, KeptRows), (head, KeptLogits)):
            Resize(f"{names[module]}.weight", (self.kept, module.weight.shape[1])).apply(model)
            module.register_buffer("rows", torch.zeros(tokens, dtype=torch.int32, device=module.weight.device))
            mix(module, mixin)
        embedding.padding_idx = None
        if tied:
            head.weight = embedding.weight


EDITS: dict[str, type[Edit]] = {
    kind.name: kind for kind in (Resize, AddBias, Factor, FactorPlus, Kept, RemoveBlock, RemovePart, Insert, Shortcuts, Vocabulary)
}
_MODULES: dict[str, Any] = {
    "linear": lambda inputs, outputs, bias=False, **place: nn.Linear(inputs, outputs, bias=bias, **place),
    "norm": lambda width, eps=1e-6, **place: nn.RMSNorm(width, eps=eps, **place),
    "bottleneck": Bottleneck,
    "fusion": Fusion,
}


def apply(model: Any, edit: Edit) -> None:
    """Make an edit and note it on the model, which keeps what its config said before the first one."""
    if not hasattr(model, "edits"):
        model.edits = []
        model.config_before = {
            name: getattr(model.config, name) for name in ("num_hidden_layers", *_BY_BLOCK) if hasattr(model.config, name)
        }
    edit.apply(model)
    model.edits.append(edit)


def edits_of(model: Any) -> Sequence[Edit]:
    """The edits that an ordinary checkpoint cannot hold, all of them; none where only whole blocks are gone."""
    made: list[Edit] = getattr(model, "edits", [])
    return [] if all(isinstance(edit, RemoveBlock) for edit in made) else made


def describe_edits(model: Any, out: Path) -> None:
    """Write the edits of a model; nothing where an ordinary checkpoint holds them."""
    if made := edits_of(model):
        listed = [{"edit": edit.name} | asdict(edit) for edit in made]  # type: ignore[call-overload]
        (out / DESCRIPTION).write_text(json.dumps({"format": f"slimbench {EDITED}", "schema": SCHEMA, "edits": listed}, indent=1) + "\n")


def config_of(model: Any, config: Any) -> Any:
    """The config that stands beside the edits: what they change in it is as it was before them."""
    for name, value in model.config_before.items() if edits_of(model) else ():
        setattr(config, name, value)
    return config


def replay(model: Any, folder: Path) -> None:
    """Make the edits that a folder names, if it does.

    Raises:
        ValueError: The schema is newer than this program, or an edit is none that it knows.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        return
    described = json.loads(path.read_text())
    if described["schema"] > SCHEMA:
        raise ValueError(f"{EDITED} schema {described['schema']} is newer than {SCHEMA}; update slimbench")
    for entry in described["edits"]:
        kind = EDITS.get(entry.pop("edit"))
        if kind is None:
            raise ValueError(f"{folder.name} has an edit that this program does not know: {entry}")
        try:
            apply(model, kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}))
        except (TypeError, KeyError, AttributeError, Unsupported) as error:
            raise ValueError(f"{folder.name} has an edit that does not fit its model: {kind.name} {entry}: {error}") from error


def _linear(model: Any, name: str) -> Any:
    layer = model.get_submodule(name)
    if type(layer) is not nn.Linear:
        raise Unsupported(f"{name} is a {type(layer).__name__}, no nn.Linear")
    return layer


def _tell_sizes(module: Any, leaf: str, shape: tuple[int, ...]) -> None:
    """Let the numbers that a module keeps of its sizes be those of its tensors."""
    if isinstance(module, nn.Linear) and leaf == "weight":
        module.out_features, module.in_features = shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = shape
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = shape
    elif hasattr(module, "num_experts"):
        if shape[0] < getattr(module, "top_k", 1):
            raise Unsupported(f"{shape[0]} experts are fewer than the {module.top_k} that a token takes")
        module.num_experts = shape[0]
        module.hidden_dim = {"gate_up_proj": shape[-1], "down_proj": shape[1], "weight": shape[-1]}.get(leaf, module.hidden_dim)
        if leaf == "down_proj":
            module.intermediate_dim = shape[-1]


def _tell_heads(attention: Any) -> None:
    """Let the numbers of heads that an attention keeps be those that its projections give."""
    query, key, width = (getattr(attention, name, None) for name in ("q_proj", "k_proj", "head_dim"))
    if width is None or not isinstance(query, nn.Linear) or not isinstance(key, nn.Linear):
        return
    heads, groups = query.out_features // width, key.out_features // width
    if hasattr(attention, "num_heads"):
        attention.num_heads = heads
    if hasattr(attention, "num_key_value_groups"):
        attention.num_key_value_groups = heads // groups


def _number_caches(model: Any) -> None:
    """Number the attentions that are left, in order: the cache of the first one must be the first."""
    count = 0
    for block in blocks_of(model).values():
        keepers = [module for module in block.modules() if isinstance(getattr(module, "layer_idx", None), int)]
        for module in keepers:
            setattr(module, "layer_idx", count)  # noqa: B010 - typed as a tensor or a module
        count += bool(keepers)
    if not count:
        raise Unsupported("the last attention cannot be removed")


def _parts(block: Any, part: str) -> tuple[str, tuple[str, ...]]:
    """Names of the norm before a part of a block and of the modules that make it.

    Raises:
        Unsupported: The block is built like none that is known here, or the part is gone already.
    """
    layout = layout_of(block)
    parts = {"attention": (layout.norms[0], (layout.attention,)), "mlp": (layout.norms[1], layout.mlp)}
    if part not in parts:
        raise Unsupported(f"{type(block).__name__} has no {part} behind a norm of its own")
    if isinstance(getattr(block, parts[part][1][-1]), NoAttention | Nothing):
        raise Unsupported(f"the {part} is gone already")
    return parts[part]
