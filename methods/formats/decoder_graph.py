"""The dense model as one traceable function, for the methods and loaders that export it as a graph.

The function has no state and no loops: everything that it needs comes in as a tensor, and its KV cache goes in and comes out as
one key and one value a layer. So an exporter sees a plain graph, and a decode step is a call with one more token.

    ids        int64 [B, T]       new tokens
    positions  int64 [T]          their places in the sequence
    keys       int64 [P + T]      0, 1, 2, … up to the last of them
    keep       int64 [K]          which of the T positions give logits
    past.N.*   float32 [B, H, P, D]
    → logits   float32 [B, K, V] and present.N.*, float32 [B, H, P + T, D]
"""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import torch

from slimbench.methods.base import Unsupported
from slimbench.methods.formats import huggingface
from slimbench.methods.formats.architecture.structure import check_experts

INPUTS = ("ids", "positions", "keys", "keep")
LOGITS = "logits"
_EXAMPLE = (2, 3, 4)  # batch, new tokens and tokens in the cache: none is 0 or 1, which exporters take for a constant


class Decoder(torch.nn.Module):
    """A dense model as a function of tokens, positions and KV cache.

    Attributes:
        cache: Heads and width of each key and value tensor, in the order key 0, value 0, key 1, …
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.cache = [(t.shape[1], t.shape[3]) for t in _cache_of(model)]

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, keep: torch.Tensor, *past: torch.Tensor) -> Any:
        from transformers import Cache

        cache: Any = Cache(layers=[_filled(*pair) for pair in zip(past[::2], past[1::2], strict=True)])
        visible = keys.unsqueeze(0) <= positions.unsqueeze(1)
        mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
        out = self.model(
            ids,
            attention_mask=mask.unsqueeze(0).unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        return (out.logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))

    def names(self, kind: str) -> list[str]:
        """Names of the cache tensors: `kind` is `past` or `present`."""
        return [f"{kind}.{index // 2}.{'value' if index % 2 else 'key'}" for index in range(len(self.cache))]

    def example(self) -> tuple[torch.Tensor, ...]:
        """Inputs of every rank and type, no size of which is special."""
        batch, new, past = _EXAMPLE
        ids = torch.ones(batch, new, dtype=torch.int64)
        places = torch.arange(past, past + new), torch.arange(past + new), torch.arange(new - 1)
        return (ids, *places, *(torch.zeros(batch, heads, past, width) for heads, width in self.cache))


def read_dense(folder: Path, trust_remote_code: bool = False) -> Decoder:
    """The dense model of a folder of safetensors, in float32, ready to be exported.

    Raises:
        methods.base.Unsupported: Its layers are more than full attention, it has experts in one tensor, or it cannot give logits of
            chosen positions.
    """
    return decoder_of(huggingface.load(folder, trust_remote_code=trust_remote_code, dtype=torch.float32))


def decoder_of(model: Any) -> Decoder:
    """A dense model in float32, ready to be exported; raises as `read_dense`."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    check_experts(model)
    name = type(model).__name__
    others = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers if type(layer) is not DynamicLayer}
    if others:
        raise Unsupported(f"{name} cannot be exported: only full attention can, and it has caches of {', '.join(sorted(others))}")
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise Unsupported(f"{name} cannot be exported: it does not take logits_to_keep")
    return Decoder(model.eval()).requires_grad_(False)


def traced(decoder: Decoder) -> Any:
    """The TorchScript of a decoder, recorded in one run; torch's check of it takes twice as long as the rest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(decoder, decoder.example(), check_trace=False)


def _cache_of(model: Any) -> list[torch.Tensor]:
    with torch.inference_mode():
        cache = model(torch.zeros(1, 1, dtype=torch.int64), use_cache=True).past_key_values
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _filled(keys: torch.Tensor, values: torch.Tensor) -> Any:
    """A layer of a cache that already holds these tensors."""
    from transformers.cache_utils import DynamicLayer

    layer = DynamicLayer()
    layer.keys, layer.values, layer.dtype, layer.device, layer.is_initialized = keys, values, keys.dtype, keys.device, True
    return layer
