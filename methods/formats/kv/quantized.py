"""A key-value cache whose history is stored in few bits, for the attention layers of transformers.

Keys and values of a layer are tensors [batch, heads, tokens, head_dim]. What is stored of them is a row of numbers that share scales:

    axis token      a row is one token of one head; `group_size` numbers of it share a scale (None: all)
    axis channel    a row is one channel of one head over `group_size` consecutive tokens, which share a scale

Integers lie on the grid of `methods.kernels.grid`, `x ≈ (q - mid) · s + o`, packed as packed weights are; e4m3 floats are
`x ≈ q · s` with s = max|x| / 448 over the row. Scales and offsets are kept in the dtype of the model.

With a residual the newest tokens stay as they are, in the order of KIVI (arXiv 2402.02750, Algorithm 1): new tokens attend to the stored
history, to the residual and to each other exactly, and only then the cache is brought up to date. Keys leave the residual whenever
`residual_length` tokens are full (so it holds 0 to `residual_length` - 1 of them), of the values only what is older than the newest
`residual_length` leaves, whatever their axis: so caches of one residual hold the same tokens exactly. Without a residual new tokens are
stored first, and attention reads what is stored, the tokens themselves included; then it makes no difference in how many pieces a text
goes through the cache.

A text that is scored goes through a cache with a residual in pieces that divide the residual: so each token sees the keys that it would
see if tokens came one by one. Of the values it sees the newest `residual_length` and those of its own piece exactly, at most one piece
more than one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, QuantizedCache

from slimbench.methods.formats.kv.scheme import CHUNK, Scheme
from slimbench.methods.kernels.grid import Grid, QuantizedWeight, unpack
from slimbench.methods.kernels.rounding import round_to_grid
from slimbench.util.compat.transformers import quantized_states

E4M3_MAX = 448.0


@dataclass(frozen=True)
class Stored:
    """Quantized keys or values; dimension 2 of every tensor counts tokens, or groups of tokens.

    Attributes:
        dtype: That of the keys and values; scales and offsets are kept in it.
        codes: uint8 (several codes in a byte), int8 or float8_e4m3fn; [B, H, T, row bytes], or along channels [B, H, T / G, D, row bytes].
        scales: [B, H, T, groups] or [B, H, T / G, D, 1]; None for floats that are cast as they are.
        offsets: Like the scales; None on a symmetric grid and for floats.
    """

    scheme: Scheme
    dtype: torch.dtype
    codes: Tensor
    scales: Tensor | None
    offsets: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.codes, self.scales, self.offsets) if tensor is not None]

    def map(self, change: Callable[[Tensor], Tensor]) -> Stored:
        """The same change to every tensor; codes are seen as bytes, since not every operator knows 8-bit floats."""
        codes = change(self.codes.view(torch.uint8)).view(self.codes.dtype)
        scales, offsets = (None if part is None else change(part) for part in (self.scales, self.offsets))
        return replace(self, codes=codes, scales=scales, offsets=offsets)

    def append(self, later: Stored) -> Stored:
        """These tokens and then those of `later`."""
        following = iter(later.tensors)
        return self.map(lambda tensor: torch.cat([tensor, next(following).view(tensor.dtype)], 2))

    def dequantize(self) -> Tensor:
        """Keys or values [B, H, T, D] in their dtype: computed in float32 and rounded once."""
        flat = self.map(lambda tensor: tensor.flatten(0, -2))
        if self.scheme.number == "e4m3":
            rows = flat.codes.float()
            rows = (rows if flat.scales is None else rows * flat.scales.float()).to(self.dtype)
        else:
            assert flat.scales is not None
            codes = unpack(flat.codes, self.scheme.bits)
            rows = QuantizedWeight(_grid(self.scheme), codes, flat.scales, flat.offsets).dequantize()
        rows = rows.unflatten(0, self.codes.shape[:-1])
        return rows.transpose(-1, -2).flatten(2, 3) if self.scheme.axis == "channel" else rows


def quantize(states: Tensor, scheme: Scheme) -> Stored:
    """Quantize keys or values [B, H, T, D]; along channels T must be a multiple of the group size."""
    rows = states.unflatten(2, (-1, scheme.group_size)).transpose(-1, -2) if scheme.axis == "channel" else states
    lead, flat = rows.shape[:-1], rows.reshape(-1, rows.shape[-1])
    if scheme.number == "e4m3":
        scales = _largest_float(flat) if scheme.scaled else None
        scaled = flat.float() if scales is None else flat.float() / scales.float()
        codes, offsets = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), None
    else:
        found = round_to_grid(flat, _grid(scheme), scheme.symmetric)
        codes, scales, offsets = found.packed_codes(), found.scales, found.offsets
    parts = (None if part is None else part.unflatten(0, lead) for part in (scales, offsets))
    return Stored(scheme, states.dtype, codes.unflatten(0, lead), *parts)


def _largest_float(rows: Tensor) -> Tensor:
    """The scale of each row by which its largest number becomes the largest float."""
    scales = (rows.float().abs().amax(-1, keepdim=True) / E4M3_MAX).to(rows.dtype)
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def _grid(scheme: Scheme) -> Grid:
    return Grid(scheme.bits, None if scheme.axis == "channel" else scheme.group_size)


class Side:
    """The keys, or the values, of one layer: stored history and exact residual.

    Args:
        residual_length: Newest tokens that stay exact; 0: none.
        at_once: They leave together when so many are full, as keys do; else each when it is older than that.
    """

    def __init__(self, scheme: Scheme, residual_length: int, at_once: bool) -> None:
        self.scheme, self.residual_length, self.at_once = scheme, residual_length, at_once
        self.stored: Stored | None = None
        self.residual: Tensor | None = None

    def extend(self, new: Tensor) -> Tensor:
        """Take in new tokens [B, H, T, D] and return all that they attend to."""
        if not self.residual_length:
            self._store(new)
            assert self.stored is not None
            return self.stored.dequantize()
        recent = new if self.residual is None else torch.cat([self.residual, new], 2)
        seen = recent if self.stored is None else torch.cat([self.stored.dequantize(), recent], 2)
        count = self._leaving(recent.shape[2])
        if count:
            self._store(recent[:, :, :count])
        self.residual = recent[:, :, count:].clone()
        return seen

    def _leaving(self, recent: int) -> int:
        if self.at_once:
            return recent // self.residual_length * self.residual_length
        return max(0, recent - self.residual_length)

    def _store(self, states: Tensor) -> None:
        quantized = quantize(states, self.scheme)
        self.stored = quantized if self.stored is None else self.stored.append(quantized)

    @property
    def tensors(self) -> list[Tensor]:
        return (self.stored.tensors if self.stored else []) + ([] if self.residual is None else [self.residual])

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """The same change to all that is held, along the batch."""
        self.stored = self.stored and self.stored.map(change)
        self.residual = None if self.residual is None else change(self.residual)


class QuantizedLayer(DynamicLayer):
    """One layer of a cache: transformers calls `update` with new keys and values, and attention reads what it returns."""

    is_croppable = False

    def __init__(self, keys: Scheme, values: Scheme, residual_length: int) -> None:
        super().__init__()
        self._make = lambda: (Side(keys, residual_length, at_once=True), Side(values, residual_length, at_once=False))
        self.sides, self.length = self._make(), 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.is_initialized = True
        self.length += key_states.shape[2]
        return self.sides[0].extend(key_states), self.sides[1].extend(value_states)

    def get_seq_length(self) -> int:
        return self.length

    def reset(self) -> None:
        self.sides, self.length, self.is_initialized = self._make(), 0, False

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("tokens that share a scale with others cannot be taken out of a quantized cache")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda tensor: tensor[indices])

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for side in self.sides:
            side.map(change)

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for side in self.sides for tensor in side.tensors]


class StoredCache(Cache):
    """A cache that knows how much memory it takes.

    Attributes:
        chunk: Tokens that go through it at once while whole texts are scored.
    """

    chunk = CHUNK

    def stored_bytes(self) -> int:
        return sum(layer_bytes(layer) for layer in self.layers)


class LibraryCache(QuantizedCache, StoredCache):
    """The quantized cache of transformers."""


def layer_bytes(layer: Any) -> int:
    """Bytes of all that a layer of a cache keeps: codes, scales, offsets and what is not quantized."""
    own = getattr(layer, "tensors", None)
    kept = own if own is not None else [layer.keys, layer.values, *quantized_states(layer)]
    return sum(tensor.numel() * tensor.element_size() for tensor in _plain(kept))


def _plain(kept: Any) -> Iterator[Tensor]:
    """The ordinary tensors inside what a library keeps: a tensor of a class of its own, or a pair of codes and a table."""
    if isinstance(kept, Tensor) and hasattr(kept, "__tensor_flatten__"):
        yield from _plain([getattr(kept, name) for name in kept.__tensor_flatten__()[0]])
    elif isinstance(kept, Tensor):
        yield kept
    elif isinstance(kept, dict):
        yield from _plain(list(kept.values()))
    elif isinstance(kept, list | tuple):
        for part in kept:
            yield from _plain(part)
