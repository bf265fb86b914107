"""Where a policy puts its own attention: one operator a layer, which sees queries and keys before they are rotated.

transformers lets anyone register the function that turns queries, keys and values into the result of an attention. Two things are missing
in it for a policy that decides what is kept: queries and keys come rotated, and the cache has joined the new ones with the old. So the
model's rotary embedding is replaced by `Unrotated`, whose angles are all 0 and which keeps the true ones for the operators, and the
layers of the cache (`Kept`) hand new keys and values on as they are and keep what the operator gives them. Projections, norms of queries
and keys and whatever else the architecture does stay its own, over any base format.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import DynamicLayer

from slimbench.methods.base import Unsupported
from slimbench.methods.formats.kv.quantized import StoredCache

NAME = "slimbench_operator"
_BY_LENGTH = ("dynamic", "longrope")
"""Types of rotations in transformers."""


class Kept(DynamicLayer):
    """What one layer keeps of the texts of a batch.

    The tensors are never changed in place, so that a copy of the dictionary is a snapshot of the layer.

    Attributes:
        seen: Tokens that came.
        tensors_by_name: What its operator keeps, along the batch first.
        reading: What its operator decided by after a prompt (`Operator.decide`), where that is asked for by an empty one; None: it is not.
    """

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.tensors_by_name: dict[str, Tensor] = {}
        self.reading: dict[str, Tensor] | None = None
        self._before: tuple[int, dict[str, Tensor]] | None = None
        self._calls: list[tuple[Operator, tuple[Tensor, ...]]] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.is_initialized = True
        self.seen += key_states.shape[2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.seen

    def reset(self) -> None:
        self.seen, self.tensors_by_name, self.is_initialized = 0, {}, False

    def keep(self, tensors: dict[str, Tensor]) -> None:
        """Keep these and nothing else: what is a part of a larger tensor is copied, so that the rest of that is free."""
        self.tensors_by_name = {name: _alone(tensor) for name, tensor in tensors.items()}

    def snapshot(self) -> tuple[int, dict[str, Tensor]]:
        return self.seen, dict(self.tensors_by_name)

    def restore(self, snapshot: tuple[int, dict[str, Tensor]]) -> None:
        self.seen, self.tensors_by_name = snapshot[0], dict(snapshot[1])

    def watch(self) -> None:
        """From now on note what its operator is given, so that `crop` can let go of some of it."""
        self._before, self._calls = self.snapshot(), []

    def settle(self) -> None:
        """No longer; what was noted is free."""
        self._before, self._calls = None, []

    def note(self, operator: Operator, *states: Tensor) -> None:
        """What its operator is called with: queries, keys and values of new tokens."""
        if self._before is not None:
            self._calls.append((operator, states))

    def crop(self, tokens_to_remove: int) -> None:
        """Let go of the last tokens: go back to where `watch` was called, and let the operator see those again that stay.

        Args:
            tokens_to_remove: Minus their number; all of them came since.
        """
        assert self._before is not None and tokens_to_remove < 0
        calls, seen = self._calls, self.seen + tokens_to_remove
        self.restore(self._before)
        self._calls = []
        if calls and (count := seen - self.seen):
            self.seen = seen
            query, key, value = (torch.cat(parts, 2)[:, :, :count] for parts in zip(*(states for _, states in calls), strict=True))
            calls[0][0](query, key, value, self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda tensor: tensor[indices])

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.tensors_by_name = {name: change(tensor) for name, tensor in self.tensors_by_name.items()}

    @property
    def tensors(self) -> list[Tensor]:
        return list(self.tensors_by_name.values())


def _alone(tensor: Tensor) -> Tensor:
    """A tensor whose memory holds nothing else."""
    is_part = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
    return tensor.clone(memory_format=torch.contiguous_format) if is_part else tensor


class KeptCache(StoredCache):
    """The layers of a model under a policy.

    Attributes:
        chunk: Tokens that go through it at once while whole texts are scored.
        rolls_back: Several tokens in one pass leave in it what they leave one by one, so that it can let go of the last ones.
    """

    def __init__(self, layers: int, chunk: int, rolls_back: bool = True) -> None:
        self.kept = [Kept() for _ in range(layers)]
        super().__init__(layers=list(self.kept))
        self.chunk, self.rolls_back = chunk, rolls_back

    def watch(self) -> None:
        """From now on, until `settle`, it can let go of tokens that come."""
        for layer in self.kept:
            layer.watch()

    def settle(self) -> None:
        for layer in self.kept:
            layer.settle()

    def snapshot(self) -> list[Any]:
        """What `restore` puts back; it shares its memory with the cache."""
        return [layer.snapshot() for layer in self.kept]

    def restore(self, snapshot: list[Any]) -> None:
        for layer, kept in zip(self.kept, snapshot, strict=True):
            layer.restore(kept)


class Rotary:
    """The rotations of a model, by position.

    Args:
        embedding: The model's own: a module that gives cosines and sines [B, T, D] for positions [B, T].
    """

    def __init__(self, embedding: nn.Module) -> None:
        self.embedding = embedding
        self._tables: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @property
    def factor(self) -> float:
        """By which rotated queries and keys are longer than they were (YaRN)."""
        return float(getattr(self.embedding, "attention_scaling", 1.0))

    def forget(self) -> None:
        """A new pass begins: no table of an earlier one is asked for again."""
        self._tables.clear()

    def __call__(self, states: Tensor, first: int) -> Tensor:
        """Rotate queries or keys [B, H, T, D] that stand at the positions first, first + 1, …; the layers of a pass share the tables."""
        span = first, states.shape[2]
        if span not in self._tables:
            self._tables[span] = self._at(states, torch.arange(first, first + span[1], device=states.device))
        return rotated(states, *self._tables[span])

    def at(self, states: Tensor, positions: Tensor) -> Tensor:
        """The same with a position for each, int64 [T]."""
        return rotated(states, *self._at(states, positions))

    def _at(self, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cosines, sines = self.embedding(states, positions[None])
        return cosines, sines


class Unrotated(nn.Module):
    """In the place of a model's rotary embedding: all angles are 0."""

    def __init__(self, rotary: Rotary) -> None:
        super().__init__()
        self.rotary, self.original, self.width = rotary, rotary.embedding, 0

    def forward(self, states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        self.rotary.forget()
        self.width = self.width or self.original(states, position_ids)[0].shape[-1]
        size = (*position_ids.shape, self.width)
        return states.new_ones(size), states.new_zeros(size)


class Operator(nn.Module):
    """The attention of one layer.

    Args:
        rotary: Those of the model.
        scaling: Factor of the products of queries and keys.

    Class attributes:
        decides_after: A prompt goes through it as through a dense model, and only then it decides what of that it keeps.
    """

    decides_after = False

    def __init__(self, rotary: Rotary, scaling: float) -> None:
        super().__init__()
        self.rotary, self.scaling = rotary, scaling

    @abstractmethod
    def forward(self, query: Tensor, key: Tensor, value: Tensor, kept: Kept | None) -> Tensor:
        """The result [B, H, T, D] for T new tokens.

        Args:
            query: [B, H, T, D], not rotated.
            key: [B, G, T, D], not rotated; each of the G heads serves H / G consecutive queries.
            value: [B, G, T, D].
            kept: What the layer keeps, which has counted these tokens; None: the text begins with them and nothing follows.
        """

    def decide(self, reading: dict[str, Tensor], kept: Kept) -> None:
        """Put into an empty layer of a cache what a prompt leaves there, from its reading; of operators that decide after it."""
        raise NotImplementedError

    @staticmethod
    def first(query: Tensor, kept: Kept | None) -> int:
        """Position of the first of the new tokens."""
        return kept.seen - query.shape[2] if kept else 0


def attentions(model: Any) -> list[Any]:
    """The attentions of a model, in order."""
    return [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "k_proj")]


def take_rotary(model: Any) -> Rotary:
    """Replace the rotary embedding of a model by one that does not rotate.

    Raises:
        Unsupported: It has none, queries and keys are rotated otherwise than in Llama, or angles depend on the length of a text.
    """
    base = model.base_model
    places = [module for module in base.modules() if isinstance(getattr(module, "rotary_emb", None), nn.Module)]
    found = attentions(model)
    if len(places) != 1 or not found or not all(map(_rotates_halves, found)):
        kind = type(model).__name__
        raise Unsupported(f"this policy is for models that rotate whole queries and keys by halves, as Llama; {kind} does not")
    if (kind := getattr(places[0].rotary_emb, "rope_type", "default")) in _BY_LENGTH:
        raise Unsupported(f"rotations of the type '{kind}' change with the length of a text, so that keys would have to be rotated anew")
    rotary = Rotary(places[0].rotary_emb)
    places[0].rotary_emb = Unrotated(rotary)
    return rotary


def rotated(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Queries or keys [B, H, T, D], turned by the angles of tables [B or 1, T, D], in the order of operations of transformers."""
    low, high = states.chunk(2, -1)
    return states * cosines.unsqueeze(1) + torch.cat([-high, low], -1) * sines.unsqueeze(1)


def _rotates_halves(attention: Any) -> bool:
    """Whether the architecture's function for rotations is `rotated`, and this layer calls it."""
    function = getattr(importlib.import_module(type(attention).__module__), "apply_rotary_pos_emb", None)
    if function is None or getattr(attention.config, "partial_rotary_factor", None) not in (None, 1, 1.0):
        return False
    if not getattr(attention, "use_rope", True):
        return False
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(1, 1, 3, attention.head_dim, generator=draw)
    tables = [torch.randn(1, 3, attention.head_dim, generator=draw) for _ in range(2)]
    found: Tensor = function(states, states, *tables)[0]
    return found.shape == states.shape and torch.equal(found, rotated(states, tables[0], tables[1]))


def install(model: Any, make: Callable[[Rotary, float, int], Operator], chunk: int, rolls_back: bool = True) -> None:
    """Put an operator into each attention of a model, and leave in `new_cache` what makes an empty cache for them.

    Args:
        make: Called with the rotations of the model, the scaling of the attention and its layer, counted from 0.
        chunk: Tokens that go through the cache at once while whole texts are scored.
        rolls_back: As of `KeptCache`.

    Raises:
        Unsupported: The model does not rotate queries and keys as Llama does, or not every layer attends to all tokens.
    """
    from slimbench.methods.formats.kv.cache import full_attention_layers

    layers, rotary = full_attention_layers(model.config), take_rotary(model)
    for module in attentions(model):
        module.operator = make(rotary, module.scaling, module.layer_idx).to(model.device)
        module.register_forward_pre_hook(_hand_over, with_kwargs=True)
    attend_by_operators(model)
    model.new_cache = lambda: KeptCache(layers, chunk, rolls_back)


def attend_by_operators(model: Any) -> None:
    """Let the attentions of a model go through their operators, without a mask."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _no_mask)
    model.set_attn_implementation(NAME)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Operators know by themselves what a token sees."""


def _hand_over(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Show the layer's part of the cache to its operator."""
    cache = kwargs.get("past_key_values")
    module.kept = None if cache is None else cache.layers[module.layer_idx]


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any) -> tuple[Tensor, None]:
    """What transformers calls; its result is [B, T, H, D]."""
    kept, module.kept = module.kept, None
    return operate(module, query, key, value, kept).transpose(1, 2).contiguous(), None


def operate(module: Any, query: Tensor, key: Tensor, value: Tensor, kept: Kept | None) -> Tensor:
    """What the operator of an attention gives; arguments as of it."""
    if kept is not None:
        kept.note(module.operator, query, key, value)
    result: Tensor = module.operator(query, key, value, kept)
    return result


def attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, seen: Tensor | None = None) -> Tensor:
    """Softmax attention [B, H, T, D] by torch's fused operator, as transformers calls it.

    Args:
        query: [B, H, T, D], rotated.
        key: [B, G, K, D], rotated.
        value: [B, G, K, D].
        seen: Whether a token attends to another, bool, [B or 1, H or 1, T, K]; None: to all before it where T = K, else to all.
    """
    if seen is None:
        causal = query.shape[2] > 1
        assert not causal or query.shape[2] == key.shape[2]
        return functional.scaled_dot_product_attention(query, key, value, scale=scaling, is_causal=causal, enable_gqa=True)
    key, value = (repeated(part, query.shape[1]) for part in (key, value))
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)


def repeated(states: Tensor, heads: int) -> Tensor:
    """Keys or values [B, G, K, D] for each of the heads of queries."""
    return states if states.shape[1] == heads else states.repeat_interleave(heads // states.shape[1], 1)


def of_each_head(states: Tensor, places: Tensor) -> Tensor:
    """Of keys or values [B, G, K, D] those at places [B, H, n] of each head of queries, [B, H, n, D]; no other is copied."""
    by_group = places.unflatten(1, (states.shape[1], -1))[..., None].expand(-1, -1, -1, -1, states.shape[3])
    return states[:, :, None].expand(-1, -1, by_group.shape[2], -1, -1).gather(3, by_group).flatten(1, 2)


def joined(earlier: Tensor | None, new: Tensor) -> Tensor:
    """Keys or values [B, G, K, D] and then the new ones."""
    return new if earlier is None else torch.cat([earlier, new], 2)


def earlier_and_itself(first: int, tokens: int, keys: int, device: Any) -> Tensor | None:
    """What tokens at first, first + 1, … see of `keys` keys that stand at 0, 1, …: bool [T, K]; None where `attention` needs no mask."""
    if tokens == 1 or tokens == keys:
        return None
    at = torch.arange(first, first + tokens, device=device)
    return torch.arange(keys, device=device)[None] <= at[:, None]
