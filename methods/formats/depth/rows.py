"""Blocks of a decoder that run for some of the tokens only."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimbench.methods.base import Unsupported
from slimbench.methods.formats.architecture.layout import layout_of
from slimbench.methods.formats.architecture.modules import NoAttention, Nothing
from slimbench.methods.formats.architecture.structure import blocks_of
from slimbench.methods.formats.kv.cache import full_attention_layers

Hear = Callable[[Tensor, Tensor, float], None]


class Partial(nn.Module):
    """The base of a model whose tokens do not all run all blocks, in the place of its forward.

    Args:
        model: A causal language model of transformers.

    Class attributes:
        batched: Several texts go through at once.

    Raises:
        Unsupported: Its blocks are not built like those of Llama.
    """

    batched: ClassVar[bool] = False

    def __init__(self, model: Any) -> None:
        super().__init__()
        check(model)
        self._base, self._head = [model.base_model], [model.get_output_embeddings()]  # in lists, so that they are no parts of this module
        self.blocks = len(blocks_of(model))

    @abstractmethod
    def tokens_by_blocks(self) -> dict[int, int]:
        """How many tokens ran so many blocks since this was made; the policy's own count."""

    @abstractmethod
    def through(self, hidden: Tensor, rotations: tuple[Tensor, Tensor], cache: Any, first: int) -> Tensor:
        """States [B, T, d] as the last norm reads them, of tokens whose states are those of the embedding; arguments as of `run_block`."""

    def run(self, input_ids: Tensor | None = None, past_key_values: Any = None, use_cache: bool | None = None, **given: Any) -> Any:
        """What the forward of the base gives.

        Raises:
            Unsupported: There are several texts, and a cache, and they do not go through at once.
        """
        from transformers.cache_utils import DynamicCache
        from transformers.modeling_outputs import MoeModelOutputWithPast

        base: Any = self._base[0]
        hidden: Tensor = base.embed_tokens(input_ids) if given.get("inputs_embeds") is None else given["inputs_embeds"]
        if len(hidden) > 1 and not self.batched:
            if past_key_values is not None or use_cache:
                raise Unsupported(f"this policy runs one text at a time where there is a cache, not {len(hidden)}")
            found: Any = torch.cat([self.run(**given | {"inputs_embeds": text}).last_hidden_state for text in hidden.split(1)])
            return MoeModelOutputWithPast(last_hidden_state=found)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=base.config)
        first = past_key_values.get_seq_length() if past_key_values is not None else 0
        places = torch.arange(first, first + hidden.shape[1], device=hidden.device)
        states = self.through(hidden, base.rotary_emb(hidden, position_ids=places[None]), past_key_values, first)
        return MoeModelOutputWithPast(last_hidden_state=base.norm(states), past_key_values=past_key_values if use_cache else None)

    def install(self, name: str) -> None:
        """Take the place of the base's forward, as a part of it of this name."""
        base: Any = self._base[0]
        setattr(base, name, self)
        base.forward = self.run


_MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
"""Numbers of a config by which some architectures multiply what Llama leaves alone."""
_LIMITS = ("clip_qkv",)
"""Numbers of a config to which some architectures cut queries, keys and values."""


def check(model: Any) -> None:
    """Raise `Unsupported` unless the blocks of a model do what those of Llama do: rotate, attend to all tokens, and add."""
    blocks, other = blocks_of(model).values(), f"this policy is for blocks built like those of Llama; {type(model).__name__} has others"
    parts = [block.get_submodule(layout_of(block).attention) for block in blocks if layout_of(block).out == "o_proj"]
    if not hasattr(model.base_model, "rotary_emb") or len(parts) < len(blocks):
        raise Unsupported(other)
    attentions = [part for part in parts if not isinstance(part, Nothing | NoAttention)]
    if not all(hasattr(part, "k_proj") and getattr(part, "use_rope", True) for part in attentions):
        raise Unsupported(other)
    full_attention_layers(model.config)
    told = [name for name in _MULTIPLIERS if getattr(model.config, name, 1) not in (1, 1.0)]
    if told := [*told, *(name for name in _LIMITS if getattr(model.config, name, None) is not None)]:
        raise Unsupported(f"this policy knows no {told[0]}, which {type(model).__name__} has")


def linear(model: Any, weight: Tensor, bias: Tensor) -> nn.Linear:
    """A frozen layer of these weights [n, d] and biases [n], where and as a model computes."""
    made = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    made.weight, made.bias = (nn.Parameter(part.to(model.device, model.dtype), requires_grad=False) for part in (weight, bias))
    return made


def run_block(
    block: Any, hidden: Tensor, active: Tensor, rotations: tuple[Tensor, Tensor], cache: Any, first: int, hear: Hear | None = None
) -> Tensor:
    """One block for some tokens; all of them give keys and values. Where a policy has put an operator into the attention, that attends.

    Args:
        hidden: [B, T, d].
        active: Those that run, int64 [n], ascending.
        rotations: Cosines and sines [B or 1, T, D] of the tokens' positions.
        cache: With the keys and values of the tokens before; None where there are none and none follow.
        first: How many tokens before them the block sees.
        hear: Is told queries [B, H, n, D], all keys [B, G, K, D], both rotated, and the factor of their products.
    """
    layout = layout_of(block)
    attention = block.get_submodule(layout.attention)
    normed = block.get_submodule(layout.norms[0])(hidden)
    if not hasattr(attention, "k_proj"):  # an edit has taken it out
        return _fed(block, hidden, active, hidden[:, active]) if len(active) else hidden
    key, value = states(attention, "k", normed), states(attention, "v", normed)
    rotate = importlib.import_module(type(attention).__module__).apply_rotary_pos_emb
    key = rotate(key, key, *rotations)[1]
    if cache is not None:
        key, value = cache.update(key, value, attention.layer_idx)
    if hasattr(attention, "operator"):
        out = _operated(attention, normed, key, value, active, cache)
        if not len(active):
            return hidden
    elif not len(active):
        return hidden
    else:
        query = states(attention, "q", normed[:, active])
        query = rotate(query, query, *(table[:, active] for table in rotations))[0]
        if hear is not None:
            hear(query, key, attention.scaling)
        out = attend(query, key, value, attention.scaling, active + first)
    return _fed(block, hidden, active, hidden[:, active] + attention.get_submodule(layout.out)(out.transpose(1, 2).flatten(2)))


def _operated(attention: Any, normed: Tensor, key: Tensor, value: Tensor, active: Tensor, cache: Any) -> Tensor:
    """What an operator [1, H, n, D] gives some tokens; it sees keys and values of all, and of those that do not run the query 0."""
    from slimbench.methods.formats.attention.operators.interface import operate

    heads, tokens = attention.q_proj.out_features // attention.head_dim, normed.shape[1]
    query = key.new_zeros(1, heads, tokens, attention.head_dim)
    if len(active):
        query = query.index_copy(2, active, states(attention, "q", normed[:, active]))
    kept = None if cache is None else cache.layers[attention.layer_idx]
    return operate(attention, query, key, value, kept)[:, :, active]


def _fed(block: Any, hidden: Tensor, active: Tensor, running: Tensor) -> Tensor:
    """States [B, T, d] after the feed-forward part, of which some tokens' are `running` [B, n, d] before it."""
    layout = layout_of(block)
    made = block.get_submodule(layout.mlp[0])(block.get_submodule(layout.norms[1])(running))
    running = running + (made[0] if isinstance(made, tuple) else made)
    return running if len(active) == hidden.shape[1] else hidden.index_copy(1, active, running)


def states(attention: Any, which: str, normed: Tensor) -> Tensor:
    """Queries, keys or values [B, heads, n, D] of normed states [B, n, d], with the norm of the architecture where it has one."""
    made = getattr(attention, f"{which}_proj")(normed)
    norm = getattr(attention, f"{which}_norm", None)
    if norm is not None and norm.weight.shape[-1] != attention.head_dim:
        made, norm = norm(made), None
    made = made.unflatten(-1, (-1, attention.head_dim))
    return (made if norm is None else norm(made)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, places: Tensor) -> Tensor:
    """Attention [B, H, n, D] of tokens at some places over all keys before them and their own."""
    count = key.shape[2]
    if query.shape[2] == 1 and int(places[-1]) == count - 1:
        return functional.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    if query.shape[2] == count:
        return functional.scaled_dot_product_attention(query, key, value, scale=scaling, is_causal=True, enable_gqa=True)
    share = query.shape[1] // key.shape[1]
    seen = torch.arange(count, device=query.device)[None] <= places[:, None]
    key, value = (part.repeat_interleave(share, 1) if share > 1 else part for part in (key, value))
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
