"""Changing the architecture of a model in memory: the edits of the format `edited`, with the numbers that stay or come in.

Whatever is done here is noted on the model, so that `save_dense` and every packed format write it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slimbench.methods.formats.architecture.edits import AddBias, Factor, RemoveBlock, RemovePart, Resize, Shortcuts, Vocabulary, apply
from slimbench.methods.formats.architecture.structure import blocks_of


@torch.no_grad()
def put(model: Any, tensor: str, values: Tensor) -> None:
    """Give a parameter other numbers, and the size of these."""
    if _parameter(model, tensor).shape != values.shape:
        apply(model, Resize(tensor, tuple(values.shape)))
    _parameter(model, tensor).copy_(values)


@torch.no_grad()
def keep(model: Any, tensor: str, kept: Tensor, runs: int, dim: int) -> None:
    """Leave only the kept of `runs` equal runs along a dimension of a parameter."""
    held = _parameter(model, tensor).detach()
    put(model, tensor, held.unflatten(dim, (runs, -1)).index_select(dim, kept.to(held.device)).flatten(dim, dim + 1))


@torch.no_grad()
def add_bias(model: Any, layer: str, values: Tensor) -> None:
    """Give a linear layer a bias [out]."""
    apply(model, AddBias(layer))
    _parameter(model, f"{layer}.bias").copy_(values)


@torch.no_grad()
def factorize(model: Any, layer: str, first: Tensor, second: Tensor) -> None:
    """Replace the weight of a linear layer by `second @ first`, [out, rank] and [rank, in]; its bias stays."""
    bias = model.get_submodule(layer).bias
    apply(model, Factor(layer, first.shape[0]))
    pair = model.get_submodule(layer)
    pair.reduce.weight.copy_(first)
    pair.expand.weight.copy_(second)
    if bias is not None:
        pair.expand.bias.copy_(bias)


def remove_blocks(model: Any, removed: Collection[int]) -> None:
    """Take blocks out of a model by index."""
    names = list(blocks_of(model))
    for index in sorted(removed, reverse=True):
        apply(model, RemoveBlock(names[index]))


def remove_part(model: Any, block: str, part: Literal["attention", "mlp"]) -> None:
    """Take the attention or the MLP out of a block, with the norm before it."""
    apply(model, RemovePart(block, part))


@torch.no_grad()
def add_shortcuts(model: Any, block: str, attention: Tensor, mlp: Tensor) -> None:
    """Put matrices [out, in] on the residual connections of a block, in place of those that it has."""
    noted = [edit for edit in getattr(model, "edits", []) if isinstance(edit, Shortcuts) and edit.module == block]
    apply(model, Shortcuts(block, tuple(attention.shape), tuple(mlp.shape)))  # type: ignore[arg-type]
    for edit in noted:
        model.edits.remove(edit)
    for part, values in (("attention_shortcut", attention), ("mlp_shortcut", mlp)):
        _parameter(model, f"{block}.{part}.weight").copy_(values)


@torch.no_grad()
def keep_tokens(model: Any, kept: Tensor) -> None:
    """Leave only some tokens of the vocabulary, ids [kept]; the first of them stands for all that are gone."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    values = [module.weight.detach()[kept.to(module.weight.device)] for module in (embedding, head)]
    apply(model, Vocabulary(len(kept)))
    for module, rows in zip((embedding, head), values, strict=True):
        module.weight.copy_(rows)
        module.rows.fill_(-1)
        module.rows[kept.to(module.rows.device)] = torch.arange(len(kept), dtype=torch.int32, device=module.rows.device)


def counts(model: Any) -> dict[str, Any]:
    """What a claim says of an architecture: parameters and decoder blocks."""
    return {"parameters": sum(p.numel() for p in model.parameters()), "layers": len(blocks_of(model))}


@torch.no_grad()
def cache_bytes_per_token(model: Any) -> int:
    """Bytes that a token of one sequence takes in the key-value cache."""
    cache = model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=True).past_key_values
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values) if t is not None)


def name_of(model: nn.Module, module: nn.Module) -> str:
    """The full name of a module."""
    return next(name for name, candidate in model.named_modules() if candidate is module)


def _parameter(model: Any, tensor: str) -> nn.Parameter:
    parameter: nn.Parameter = model.get_parameter(tensor)
    return parameter
