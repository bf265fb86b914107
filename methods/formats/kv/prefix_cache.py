"""The cache of a model under `methods.formats.kv.prefix`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

_AT_ONCE = 1 << 30  # no text is as long: it goes through the cache in one piece


class PrefixLayer(DynamicLayer):
    """The cache of a layer that begins with keys and values [heads, k, head_dim], the same for all sequences of a batch."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.prefix = keys, values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        pairs = zip(self.prefix, (key_states, value_states), strict=True)
        self.keys, self.values = (part.to(like).expand(len(like), *part.shape) for part, like in pairs)
        self.is_initialized = True

    def get_seq_length(self) -> int:
        held = self.keys if self.keys is not None else self.prefix[0]
        return int(held.shape[-2])

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False


class PrefixCache(Cache):
    """A cache that begins with the keys and values of each layer in turn.

    Attributes:
        chunk: Tokens that go through it at once while whole texts are scored.
    """

    chunk = _AT_ONCE

    def __init__(self, states: Sequence[Tensor] | nn.ParameterList) -> None:
        held = list(states)
        super().__init__(layers=[PrefixLayer(keys, values) for keys, values in zip(held[::2], held[1::2], strict=True)])
