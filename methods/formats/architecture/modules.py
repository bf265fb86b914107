"""The modules that edits put into a model: the only ones that the format `edited` can name."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class FactorPair(nn.Sequential):
    """A linear layer as two: [rank, in], then [out, rank] with the bias."""

    def __init__(self, inputs: int, rank: int, outputs: int, bias: bool, **place: Any) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Linear(inputs, rank, bias=False, **place), nn.Linear(rank, outputs, bias=bias, **place)


class FactorPairPlus(FactorPair):
    """A pair and some rows of a weight beside it: to the outputs `kept` [rows], int32, those of `sparse` [rows, in] are added."""

    def __init__(self, inputs: int, rank: int, outputs: int, rows: int, bias: bool, **place: Any) -> None:
        super().__init__(inputs, rank, outputs, bias, **place)
        self.sparse = nn.Linear(inputs, rows, bias=False, **place)
        self.kept: Tensor
        self.register_buffer("kept", torch.zeros(rows, dtype=torch.int32, device=place.get("device")))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.expand(self.reduce(x))
        return made.index_add(-1, self.kept, self.sparse(x).to(made.dtype))


class Nothing(nn.Module):
    """In the place of a layer: adds nothing to the residual connection."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros_like(x)


class NoAttention(nn.Module):
    """In the place of an attention: adds nothing to the residual connection and keeps no keys and values."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


class Bottleneck(nn.Module):
    """x + up(f(down(x))): the adapter of Houlsby et al. (arXiv 1902.00751), hidden states [..., width]."""

    activations: ClassVar[dict[str, type[nn.Module]]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}

    def __init__(self, width: int, size: int, activation: str = "gelu", **place: Any) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, size, **place), nn.Linear(size, width, **place)
        self.activation = self.activations[activation]()

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = x + self.change(x)
        return made

    def change(self, x: Tensor) -> Tensor:
        """What the adapter adds to its inputs."""
        changed: Tensor = self.up(self.activation(self.down(x)))
        return changed


class Fusion(nn.Module):
    """x + Σ_n s_n V z_n: a token attends over what adapters add to it (AdapterFusion, arXiv 2005.00247), hidden states [..., width].

    z_n is the change of adapter n, and s the softmax over n of the products (Q x + q) · (K z_n + k).
    """

    def __init__(self, width: int, size: int, count: int, activation: str = "gelu", **place: Any) -> None:
        super().__init__()
        self.adapters: Any = nn.ModuleList(Bottleneck(width, size, activation, **place) for _ in range(count))
        self.query, self.key = nn.Linear(width, width, **place), nn.Linear(width, width, **place)
        self.value = nn.Linear(width, width, bias=False, **place)

    def forward(self, x: Tensor) -> Tensor:
        changes = torch.stack([adapter.change(x) for adapter in self.adapters], -2)
        shares = (self.key(changes) @ self.query(x).unsqueeze(-1)).squeeze(-1).softmax(-1)
        mixed: Tensor = (shares.unsqueeze(-2) @ self.value(changes)).squeeze(-2)
        return x + mixed


class Extended:
    """Mixed into the class of a module: inserted modules see its inputs before it does, or its outputs after it."""

    places: dict[str, str]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self
        before, after = ([getattr(module, name) for name, where in self.places.items() if where == place] for place in ("before", "after"))
        for inserted in before:
            if args:
                args = (inserted(args[0]), *args[1:])
            else:
                kwargs["hidden_states"] = inserted(kwargs["hidden_states"])
        made = super().forward(*args, **kwargs)  # type: ignore[misc]
        first = made[0] if isinstance(made, tuple) else made
        for inserted in after:
            first = inserted(first)
        return (first, *made[1:]) if isinstance(made, tuple) else first


class ShortcutBlock:
    """Mixed into the class of a Llama-like block: a matrix on each of its two residual connections."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Hidden states [..., in] of the block's input coordinates; the result is [..., out] of its output coordinates."""
        block: Any = self
        between = self.attend(hidden_states, **kwargs)
        return block.mlp_shortcut(between) + block.mlp(block.post_attention_layernorm(between))

    def attend(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """The first half of the block: hidden states between attention and MLP."""
        block: Any = self
        attended = block.self_attn(hidden_states=block.input_layernorm(hidden_states), **kwargs)[0]
        return block.attention_shortcut(hidden_states) + attended


class KeptRows:
    """Mixed into the class of an embedding that holds some tokens of the vocabulary alone."""

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids of the whole vocabulary; those without a row of their own take the row 0."""
        module: Any = self
        return super().forward(module.rows[ids].clamp_min(0))  # type: ignore[misc]


class KeptLogits:
    """Mixed into the class of a head over some tokens of the vocabulary: all others get the lowest number of the dtype."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        module: Any = self
        logits = super().forward(hidden_states)  # type: ignore[misc]
        rows = module.rows
        return logits[..., rows.clamp_min(0)].masked_fill_(rows < 0, torch.finfo(logits.dtype).min)


class KeptInputs:
    """Mixed into the class of a linear layer that reads some of its inputs alone: `kept` [n], int32."""

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        made: Tensor = super().forward(x.index_select(-1, module.kept))  # type: ignore[misc]
        return made


class KeptOutputs:
    """Mixed into the class of a linear layer that makes some of its outputs alone, `kept` [n], int32; the others are zero."""

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        made: Tensor = super().forward(x)  # type: ignore[misc]
        return made.new_zeros((*made.shape[:-1], module.width)).index_add(-1, module.kept, made)


def mix(module: nn.Module, mixin: type) -> None:
    """Put a mixin before the class of a module, in place."""
    if not isinstance(module, mixin):
        module.__class__ = type(f"{mixin.__name__}{type(module).__name__}", (mixin, type(module)), {})
