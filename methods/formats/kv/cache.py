"""Policies of the slot `cache`: how the keys and values of a model are stored while it generates (`methods.formats.policy`).

Installed, a policy leaves on the model, as `new_cache`, what makes an empty cache; an engine that finds it there puts every token through
such a cache, so that quality is measured with the policy in force.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import DenseModel, ModelShape, Unsupported
from slimbench.methods.formats.kv.scheme import CHUNK, Scheme
from slimbench.methods.formats.policy import Policy, Scoring

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

LENGTHS = tuple(2**power for power in range(10, 16))
"""Tokens at which the bytes of a cache are told: 1k to 32k."""
_ALL = 1 << 30  # tokens that stay exact where all do


class CachePolicy(Policy):
    """A policy that makes the cache; `residual_length` of the newest tokens stay exact."""

    slot = "cache"
    residual_length: int

    @property
    def scoring(self) -> Scoring:
        return "chunk" if self.residual_length else "exact"

    @property
    def rolls_back(self) -> bool:
        """Tokens that were rounded share bytes, or scales, with others."""
        return False

    @abstractmethod
    def exact_keys(self, tokens: int, prompt: int = 0) -> int:
        """Pairs of a query and a key that it attends to, itself included, whose key is not rounded, of the `tokens` · (`tokens` + 1) / 2
        pairs of a text that is scored from its first token on. How many of them were its `prompt` changes nothing.
        """

    def neutral(self) -> CachePolicy:
        return replace(self, residual_length=_ALL)  # type: ignore[type-var]

    @abstractmethod
    def new(self, config: Any) -> Cache:
        """An empty cache for a model of this config."""

    def install(self, model: Any) -> None:
        model.new_cache, model.exact_keys = (lambda: self.new(model.config)), self.exact_keys


@dataclass(frozen=True)
class OwnCache(CachePolicy):
    """The own cache: how keys and values are stored, and how many of the newest tokens stay exact."""

    kind = "quantized"

    keys: Scheme
    values: Scheme
    residual_length: int = 0

    def __post_init__(self) -> None:
        for name in ("keys", "values"):
            if isinstance(given := getattr(self, name), dict):
                object.__setattr__(self, name, Scheme(**given))
        group = self.keys.group_size if self.keys.axis == "channel" else None
        if self.residual_length < 0:
            raise ValueError(f"residual_length must not be negative, not {self.residual_length}")
        if group and (not self.residual_length or self.residual_length % group):
            raise ValueError(f"residual_length must be a positive multiple of group_size {group}, not {self.residual_length}")

    def check(self, shape: ModelShape) -> None:
        for scheme in (self.keys, self.values):
            if scheme.axis == "token" and scheme.group_size and shape.head_dim % scheme.group_size:
                raise Unsupported(f"group_size {scheme.group_size} does not divide the head dimension {shape.head_dim}")
        if shape.head_dim % 8:
            raise Unsupported(f"the head dimension {shape.head_dim} is not a multiple of 8")

    def exact_keys(self, tokens: int, prompt: int = 0) -> int:
        """Without a residual none; else a token sees those keys exactly that came since the residual was full last, and itself."""
        if not self.residual_length:
            return 0
        whole, rest = divmod(tokens, self.residual_length)
        return whole * _pairs(self.residual_length) + _pairs(rest)

    def new(self, config: Any) -> Cache:
        from slimbench.methods.formats.kv.quantized import QuantizedLayer, StoredCache

        layers = full_attention_layers(config)
        cache = StoredCache([QuantizedLayer(self.keys, self.values, self.residual_length) for _ in range(layers)])
        cache.chunk = math.gcd(CHUNK, self.residual_length)
        return cache


@dataclass(frozen=True)
class TransformersCache(CachePolicy):
    """The quantized cache of transformers; the fields are its arguments."""

    kind = "transformers"

    backend: Literal["quanto", "hqq"]
    nbits: int
    axis_key: int
    axis_value: int
    q_group_size: int
    residual_length: int

    def __post_init__(self) -> None:
        if self.residual_length < 1:
            raise ValueError(f"residual_length must be positive, not {self.residual_length}")

    def check(self, shape: ModelShape) -> None:
        if shape.head_dim % self.q_group_size:
            raise Unsupported(f"group_size {self.q_group_size} does not divide the head dimension {shape.head_dim}")

    def exact_keys(self, tokens: int, prompt: int = 0) -> int:
        """A piece sees itself and the residual exactly. The first is rounded at once; later ones stay until the residual is full."""
        exact = residual = 0
        chunk = math.gcd(CHUNK, self.residual_length)
        for first in range(0, tokens, chunk):
            piece = min(chunk, tokens - first)
            exact += piece * residual + _pairs(piece)
            leaves = first == 0 or (residual and residual + 1 >= self.residual_length)
            residual = 0 if leaves else residual + piece
        return exact

    def new(self, config: Any) -> Cache:
        from slimbench.methods.formats.kv.quantized import LibraryCache

        full_attention_layers(config)
        cache = LibraryCache(config=config, **asdict(self))
        cache.chunk = math.gcd(CHUNK, self.residual_length)
        return cache


def _pairs(tokens: int) -> int:
    """Pairs of a token and one that it attends to, itself included."""
    return tokens * (tokens + 1) // 2


def facts(policy: CachePolicy, dense: DenseModel) -> dict[str, Any]:
    """What a cache of a policy takes, with keys and values of a model.

    Returns:
        `cache_bytes` and `dense_cache_bytes`: bytes of one sequence by its number of tokens, and `cache_bits`: bits of a stored number at
        the longest, scales and residual included.

    Raises:
        Unsupported: Not every layer of the model attends to all tokens.
    """
    heads = kv_heads(dense)
    stored, exact = (cache_bytes(which, dense.shape.head_dim, heads, dense.dtype) for which in (policy, None))
    bits = 8 * stored[str(LENGTHS[-1])] / (2 * sum(heads) * dense.shape.head_dim * LENGTHS[-1])
    return {"cache_bytes": stored, "dense_cache_bytes": exact, "cache_bits": round(bits, 4)}


def bytes_per_token(sizes: dict[str, int]) -> float:
    """Bytes of a further token, once what stays exact is full."""
    before, last = LENGTHS[-2:]
    return (sizes[str(last)] - sizes[str(before)]) / (last - before)


def kv_heads(dense: DenseModel) -> list[int]:
    """Heads of keys and values of each layer that has an attention. Raises `Unsupported` as `full_attention_layers`."""
    from transformers import AutoConfig

    from slimbench.methods.formats import storage
    from slimbench.methods.formats.architecture import edits

    layers = full_attention_layers(AutoConfig.from_pretrained(dense.path))
    if not (dense.path / edits.DESCRIPTION).is_file():
        return [dense.shape.num_kv_heads] * layers
    attentions = [module for module in storage.skeleton(dense.path).modules() if hasattr(module, "k_proj")]
    return [attention.k_proj.out_features // dense.shape.head_dim for attention in attentions]


def full_attention_layers(config: Any) -> int:
    """Layers of a model that all attend to all tokens.

    Raises:
        Unsupported: Some of them do not.
    """
    from transformers.cache_utils import get_layer_types_and_kwargs

    kinds, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    if others := sorted(set(kinds) - {"full_attention"}):
        raise Unsupported(f"a policy of the cache is for layers that attend to all tokens; this model has {', '.join(others)}")
    return len(kinds)


def cache_bytes(policy: CachePolicy | None, head_dim: int, heads: Sequence[int], dtype: str) -> dict[str, int]:
    """Bytes of the cache of one sequence by its number of tokens: a layer of each size is filled with random keys and values and counted.

    Args:
        policy: None: the cache of the uncompressed model.
        heads: Of keys and values, layer by layer.
        dtype: Name of the torch dtype of keys and values.
    """
    import torch
    from transformers import LlamaConfig
    from transformers.cache_utils import DynamicCache

    from slimbench.methods.formats.kv.quantized import layer_bytes

    one = LlamaConfig(num_hidden_layers=1)
    generator, found = torch.Generator().manual_seed(0), dict.fromkeys(map(str, LENGTHS), 0)
    for length in LENGTHS:
        for count, layers in Counter(heads).items():
            cache = policy.new(one) if policy else DynamicCache(config=one)
            size = (1, count, length, head_dim)
            keys, values = (torch.randn(size, generator=generator).to(getattr(torch, dtype)) for _ in range(2))
            cache.update(keys, values, 0)
            found[str(length)] += layers * layer_bytes(cache.layers[0])
    return found
