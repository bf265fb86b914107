"""The artefact format `kv-cache`: an ordinary dense model, and in `generation.json` how its key-value cache is stored.

`generation.json` names the schema and, under `kv_cache`, either the `keys`, `values` and `residual_length` of the own cache
(`methods.formats.kv_quantized`), or the `backend` and settings of the one in transformers. The loader leaves on the model, as
`new_cache`, what makes an empty cache; an engine that finds it there puts every token through such a cache, so that quality is measured
with the policy in force.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import DenseModel, ModelShape, Unsupported
from slimbench.methods.formats import huggingface
from slimbench.methods.formats.huggingface import link_source
from slimbench.methods.formats.kv_scheme import Scheme

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

FORMAT = "kv-cache"
DESCRIPTION = "generation.json"
SCHEMA = 1
LENGTHS = tuple(2**power for power in range(10, 16))
"""Tokens at which the bytes of a cache are told: 1k to 32k."""


@dataclass(frozen=True)
class OwnCache:
    """The own cache: how keys and values are stored, and how many of the newest tokens stay exact."""

    keys: Scheme
    values: Scheme
    residual_length: int = 0

    def __post_init__(self) -> None:
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

    def new(self, config: Any) -> Cache:
        from slimbench.methods.formats.kv_quantized import QuantizedLayer, StoredCache

        layers = full_attention_layers(config)
        cache = StoredCache([QuantizedLayer(self.keys, self.values, self.residual_length) for _ in range(layers)])
        cache.chunk = math.gcd(cache.chunk, self.residual_length)
        return cache


@dataclass(frozen=True)
class TransformersCache:
    """The quantized cache of transformers; the fields are its arguments."""

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

    def new(self, config: Any) -> Cache:
        from slimbench.methods.formats.kv_quantized import LibraryCache

        full_attention_layers(config)
        cache = LibraryCache(config=config, **asdict(self))
        cache.chunk = math.gcd(cache.chunk, self.residual_length)
        return cache


Policy = OwnCache | TransformersCache


def save(policy: Policy, dense: DenseModel, out: Path) -> dict[str, Any]:
    """Write the model and the policy, and say what a cache of it takes.

    Returns:
        `cache_bytes` and `dense_cache_bytes`: bytes of one sequence by its number of tokens, and `cache_bits`: bits of a stored number at
        the longest, scales and residual included.

    Raises:
        Unsupported: Not every layer of the model attends to all tokens.
    """
    from transformers import AutoConfig

    layers = full_attention_layers(AutoConfig.from_pretrained(dense.path))
    link_source(dense, out)
    description = {"format": "slimbench generation", "schema": SCHEMA, "kv_cache": asdict(policy)}
    (out / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
    quantized, exact = cache_bytes(policy, dense.shape, layers, dense.dtype), cache_bytes(None, dense.shape, layers, dense.dtype)
    numbers = 2 * layers * dense.shape.num_kv_heads * dense.shape.head_dim * LENGTHS[-1]
    bits = 8 * quantized[str(LENGTHS[-1])] / numbers
    return {"cache_bytes": quantized, "dense_cache_bytes": exact, "cache_bits": round(bits, 4)}


def load(folder: Path, device: str = "cpu", trust_remote_code: bool = False) -> Any:
    """Load the model in evaluation mode and leave on it, as `new_cache`, what makes an empty cache."""
    policy, model = read(folder), huggingface.load(folder, device, trust_remote_code)
    model.new_cache = _maker(policy, model.config)
    return model


def read(folder: Path) -> Policy:
    """The policy of an artefact.

    Raises:
        ValueError: The schema is newer than this program.
    """
    described = json.loads((folder / DESCRIPTION).read_text())
    if described["schema"] > SCHEMA:
        raise ValueError(f"generation schema {described['schema']} is newer than {SCHEMA}; update slimbench")
    cache = described["kv_cache"]
    if "backend" in cache:
        return TransformersCache(**cache)
    return OwnCache(Scheme(**cache["keys"]), Scheme(**cache["values"]), cache["residual_length"])


def full_attention_layers(config: Any) -> int:
    """Layers of a model that all attend to all tokens.

    Raises:
        Unsupported: Some of them do not.
    """
    from transformers.cache_utils import get_layer_types_and_kwargs

    kinds, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    if others := sorted(set(kinds) - {"full_attention"}):
        raise Unsupported(f"a quantized cache is for layers that attend to all tokens; this model has {', '.join(others)}")
    return len(kinds)


def cache_bytes(policy: Policy | None, shape: ModelShape, layers: int, dtype: str) -> dict[str, int]:
    """Bytes of the cache of one sequence by its number of tokens: one layer is filled with random keys and values and counted.

    Args:
        policy: None: the cache of the uncompressed model.
        dtype: Name of the torch dtype of keys and values.
    """
    import torch
    from transformers import LlamaConfig
    from transformers.cache_utils import DynamicCache

    from slimbench.methods.formats.kv_quantized import layer_bytes

    one = LlamaConfig(num_hidden_layers=1)
    generator, found = torch.Generator().manual_seed(0), {}
    for length in LENGTHS:
        cache = policy.new(one) if policy else DynamicCache(config=one)
        size = (1, shape.num_kv_heads, length, shape.head_dim)
        keys, values = (torch.randn(size, generator=generator).to(getattr(torch, dtype)) for _ in range(2))
        cache.update(keys, values, 0)
        found[str(length)] = layers * layer_bytes(cache.layers[0])
    return found


def _maker(policy: Policy, config: Any) -> Callable[[], Cache]:
    return lambda: policy.new(config)
