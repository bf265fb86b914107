"""Rotating the hidden states of a Llama-like model, so that it computes the same with other weights.

RMSNorm without a gain commutes with an orthogonal matrix Q: norm(x Q) = norm(x) Q. So, once the gains are folded into the layers
after the norms, every layer that writes to the residual stream may write x Q, if every one that reads it has Qᵀ before its weight:

    embedding E -> E Q      reading (query, key, value, gate, up, head) W -> W Q      writing (output, down) W -> Qᵀ W

A random Q is diag(signs) (R ⊗ H): H the Hadamard matrix of the largest power of two in the width, R random orthogonal of what is left
of it (one by one for a power of two), signs random. Every hidden channel is spread over all.

Attention weights mix positions, not channels: so the heads of the value projection may write x Q too, if the output projection reads it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimbench.methods.base import Unsupported
from slimbench.methods.core.architecture.anatomy import anatomy
from slimbench.methods.core.architecture.equivalent import Link, links
from slimbench.methods.formats.architecture.structure import blocks_of
from slimbench.methods.kernels.numbers import hadamard, largest_power_of_two


def orthogonal(size: int, seed: int) -> Tensor:
    """A random Q for hidden states of a size: float64 [size, size]."""
    generator = torch.Generator().manual_seed(seed)
    block = largest_power_of_two(size)
    rest, triangle = torch.linalg.qr(torch.randn(size // block, size // block, generator=generator, dtype=torch.float64))
    rest = (rest * triangle.diagonal().sign()).contiguous()
    signs = torch.randint(0, 2, (size, 1), generator=generator, dtype=torch.float64) * 2 - 1
    return signs * torch.kron(rest, hadamard(torch.eye(block, dtype=torch.float64), block))


@torch.no_grad()
def rotate(model: Any, rotation: Tensor) -> None:
    """Fold the gains of all norms and rotate the hidden states, in place, in float64. The head no longer shares the embedding's weight.

    Args:
        rotation: Q, float64 [hidden, hidden].

    Raises:
        Unsupported: The model is not built like Llama, or its norms do not commute with a rotation.
    """
    rotation = rotation.to(model.device)
    norms = fold_gains(model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for weight in (embedding.weight, head.weight):
        _set(weight, weight.double() @ rotation)
    for link in norms:
        for layer in link.layers.values():
            _set(layer.weight, layer.weight.double() @ rotation)
    for block in anatomy(model):
        for layer in (block.attention.out, block.mlp.down):
            _set(layer.weight, rotation.T @ layer.weight.double())
            if layer.bias is not None:
                _set(layer.bias, layer.bias.double() @ rotation)


@torch.no_grad()
def fold_gains(model: Any) -> list[Link]:
    """Fold the gains of all norms into the layers after them, in place. The head no longer shares the embedding's weight.

    Returns:
        The norms of the blocks with those layers.

    Raises:
        Unsupported: The model is not built like Llama, or its norms do not commute with a rotation.
    """
    norms = [link for name, block in blocks_of(model).items() for link in links(model, name, block, ("norm",))]
    final = getattr(model.base_model, "norm", None)
    if final is None:
        raise Unsupported(f"{type(model).__name__} has no norm before its head")
    untie(model)
    for link in norms:
        gain: Any = link.source.weight
        _check_commutes(link.source)
        link.fold_scale(gain.detach().clone())
        gain.fill_(1)
    _check_commutes(final)
    head = model.get_output_embeddings()
    _set(head.weight, head.weight.double() * final.weight.double())
    final.weight.fill_(1)
    return norms


@torch.no_grad()
def rotate_heads(value: nn.Linear, output: nn.Linear, rotation: Tensor) -> None:
    """Rotate each head of what a value projection gives to the output projection, in place: W_v -> Qᵀ W_v, W_o -> W_o Q by heads.

    Args:
        rotation: Q, float64 [head, head].
    """
    rotation = rotation.to(value.weight.device)
    _set(value.weight, by_heads(value.weight.double().T, rotation).T)
    if value.bias is not None:
        _set(value.bias, by_heads(value.bias.double(), rotation))
    _set(output.weight, by_heads(output.weight.double(), rotation))


def by_heads(x: Tensor, rotation: Tensor) -> Tensor:
    """Multiply each run of n numbers in the last dimension by a matrix [n, n]."""
    return (x.unflatten(-1, (-1, len(rotation))) @ rotation).flatten(-2)


@torch.no_grad()
def transform_inputs(layer: nn.Linear, block: int) -> None:
    """Change the weight of a layer whose inputs will come through a Hadamard transform in blocks."""
    _set(layer.weight, hadamard(layer.weight.double(), block))


@torch.no_grad()
def transform_outputs(layer: nn.Linear, block: int) -> None:
    """Make a layer give its outputs through a Hadamard transform in blocks."""
    _set(layer.weight, hadamard(layer.weight.double().T.contiguous(), block).T)
    if layer.bias is not None:
        _set(layer.bias, hadamard(layer.bias.double(), block))


def untie(model: Any) -> None:
    """Give the output head a weight of its own."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def set_dtype(model: Any, dtype: torch.dtype) -> None:
    """Round the parameters of a model to a dtype; buffers, such as the frequencies of rotary embeddings, stay as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _set(parameter: Tensor, values: Tensor) -> None:
    parameter.copy_(values.to(parameter.dtype))


def _check_commutes(norm: Any) -> None:
    """Raise `Unsupported` for a norm that takes more than the root mean square from its inputs, such as their mean."""
    width = norm.weight.numel()
    probe = torch.linspace(0.1, 1, width, dtype=norm.weight.dtype, device=norm.weight.device).unsqueeze(0)
    ones = {name: torch.ones_like(p) if name == "weight" else torch.zeros_like(p) for name, p in norm.named_parameters()}
    plain = torch.func.functional_call(norm, ones, (probe,))
    if not torch.allclose(plain, probe * probe.float().square().mean().rsqrt().to(probe.dtype), rtol=1e-2):
        raise Unsupported(f"{type(norm).__name__} does not commute with a rotation")
