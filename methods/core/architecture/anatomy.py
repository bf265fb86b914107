"""What the blocks of a decoder are made of: one description of Llama-like models, OPT and models of experts like Mixtral and OLMoE.

    attention   q, k, v -> out      heads of the same width; a key and a value head serve a group of `repeats` query heads
    MLP         down(f(gate x) · up x), or down(f(up x)) where there is no gate
    experts     such an MLP each, their matrices stacked, and a router that gives each token to some of them

A description holds the modules themselves, so it stays true when their tensors are cut or replaced (`surgery`), and sizes are read
from the tensors and not from the config. It must be made anew where modules or blocks are taken out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from slimbench.methods.base import Unsupported
from slimbench.methods.formats.architecture.layout import Layout, layout_of, unlike
from slimbench.methods.formats.architecture.structure import blocks_of

_BESIDE = {"q_norm", "k_norm", "rotary_emb", "act_fn", "activation_fn", "attention_shortcut", "mlp_shortcut"}
"""What else may stand in a block, an attention or an MLP: it has no share in what the description says."""


@dataclass(frozen=True)
class Attention:
    """Heads of one width.

    Attributes:
        q: Its weight is [heads · head_dim, hidden].
        k: [groups · head_dim, hidden], as that of v.
        out: [hidden, heads · head_dim].
        norms: Of queries and of keys; empty where there are none.
    """

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    out: nn.Linear
    norms: tuple[nn.Module, ...]
    head_dim: int

    @property
    def groups(self) -> int:
        """Key and value heads; all of a group's query heads lie side by side."""
        return self.k.out_features // self.head_dim

    @property
    def repeats(self) -> int:
        """Query heads of a group."""
        return self.q.out_features // self.k.out_features

    @property
    def joined(self) -> bool:
        """Whether a norm runs over all heads together, so that one head less changes the others."""
        return any(parameter.numel() != self.head_dim for norm in self.norms for parameter in norm.parameters())


@dataclass(frozen=True)
class MLP:
    """One MLP for all tokens.

    Attributes:
        gate: Its weight is [channels, hidden], as that of up.
        down: [hidden, channels].
    """

    gate: nn.Linear | None
    up: nn.Linear
    down: nn.Linear

    @property
    def makes(self) -> tuple[nn.Linear, ...]:
        """The layers whose outputs are the channels."""
        return (self.up,) if self.gate is None else (self.gate, self.up)


@dataclass(frozen=True)
class Experts:
    """MLPs of the same size, of which a token takes some.

    Attributes:
        router: `weight` [experts, hidden].
        stack: `gate_up_proj` [experts, 2 · channels, hidden], the rows of gate before those of up; `down_proj` [experts, hidden, channels].
    """

    router: Any
    stack: Any

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.stack.down_proj)

    @property
    def channels(self) -> int:
        """Of each expert. The grouped products of transformers want a number that fills whole runs of 16 bytes."""
        return int(self.stack.down_proj.shape[-1])


@dataclass(frozen=True)
class Block:
    """A decoder block.

    Attributes:
        name: Full name in the model.
        norms: The one before the attention and the one before the MLP or the experts.
    """

    name: str
    module: nn.Module
    norms: tuple[nn.Module, nn.Module]
    attention: Attention
    feed: MLP | Experts

    @property
    def mlp(self) -> MLP:
        """The one MLP.

        Raises:
            Unsupported: There are experts.
        """
        if isinstance(self.feed, Experts):
            raise Unsupported(f"{type(self.module).__name__} has {self.feed.count} experts in one tensor in the place of an MLP")
        return self.feed

    def name_of(self, part: nn.Module) -> str:
        """The full name of a module of the block."""
        return next(f"{self.name}.{name}" for name, module in self.module.named_modules() if module is part)

    def named(self, *layers: nn.Linear) -> dict[str, nn.Linear]:
        """Layers of the block by their full names."""
        return {self.name_of(layer): layer for layer in layers}


def anatomy(model: Any) -> list[Block]:
    """The blocks of a model, in order.

    Raises:
        Unsupported: They are not built like those of Llama, OPT or Mixtral.
    """
    return [block_of(model, name, module) for name, module in blocks_of(model).items()]


def block_of(model: Any, name: str, module: nn.Module) -> Block:
    """One block of a model, by its full name.

    Raises:
        Unsupported: It is not built like those of Llama, OPT or Mixtral.
    """
    layout = layout_of(module)
    first, second = (module.get_submodule(norm) for norm in layout.norms)
    _check_children(module, {*layout.parts})
    return Block(name, module, (first, second), _attention(model, module, layout), _feed(module, layout))


def _attention(model: Any, block: nn.Module, layout: Layout) -> Attention:
    attention: Any = block.get_submodule(layout.attention)
    _check_children(attention, {*layout.queries, layout.out})
    q, k, v, out = (_linear(attention, name) for name in (*layout.queries, layout.out))
    width = getattr(attention, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    if k.out_features % width or q.out_features % k.out_features or (v.out_features, out.in_features) != (k.out_features, q.out_features):
        sizes = ", ".join(str(size) for size in (q.out_features, k.out_features, v.out_features, out.in_features))
        raise unlike(type(block).__name__, f"queries, keys, values and output of {sizes} features are no groups of heads of {width}")
    return Attention(q, k, v, out, tuple(getattr(attention, norm) for norm in ("q_norm", "k_norm") if hasattr(attention, norm)), width)


def _feed(block: nn.Module, layout: Layout) -> MLP | Experts:
    if layout.router and layout.experts:
        router, stack = block.get_submodule(layout.router), block.get_submodule(layout.experts)
        _check_children(block.get_submodule(layout.mlp[0]), {name.rpartition(".")[2] for name in (layout.router, layout.experts)})
        held = {name: tuple(tensor.shape) for module in (router, stack) for name, tensor in module.named_parameters()}
        experts, hidden, channels = held.get("down_proj", (0, 0, 0))
        if held != _stacked(experts, hidden, channels):
            raise unlike(type(block).__name__, f"its experts and their router hold {held}")
        return Experts(router, stack)
    names = [name for name in (layout.gate, layout.up, layout.down) if name]
    if layout.mlp[0] not in names:
        _check_children(block.get_submodule(layout.mlp[0]), {name.rpartition(".")[2] for name in names})
    return MLP(_linear(block, layout.gate) if layout.gate else None, _linear(block, layout.up), _linear(block, layout.down))


def _stacked(experts: int, hidden: int, channels: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a router and its experts."""
    return {
        "weight": (experts, hidden),
        "gate_up_proj": (experts, 2 * channels, hidden),
        "down_proj": (experts, hidden, channels),
    }


def _linear(owner: nn.Module, name: str) -> nn.Linear:
    parent, _, leaf = name.rpartition(".")
    layer = getattr(owner.get_submodule(parent), leaf, None)
    if type(layer) is not nn.Linear:
        raise unlike(type(owner).__name__, f"{name} is " + ("missing" if layer is None else f"a {type(layer).__name__}"))
    return layer


def _check_children(owner: nn.Module, known: set[str]) -> None:
    """Raise `Unsupported` if a module holds modules, or tensors of its own, that are not known."""
    held = [*owner.named_children(), *owner.named_parameters(recurse=False)]
    if others := {name for name, _ in held} - known - _BESIDE:
        raise unlike(type(owner).__name__, f"it holds {', '.join(sorted(others))}")
