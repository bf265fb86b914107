"""The residual stream of a decoder: what writes it, what reads it, and masks on its features, which stand for a narrower stream.

A mask z [hidden] multiplies what embeddings, attentions and MLPs write, and what the norms give on. A norm takes its mean over the n
features with z ≠ 0, as it does once the others are cut: for RMS norms

    z_j · x_j / √(1/n Σ_i x_i² + ε) · g_j        x_i = 0 where z_i = 0

which is √(n/d) times the norm of √(d/n) x over all d features; LayerNorm likewise, of x less the mean over the n features. Without the
mean over n features, what is cut would not be what was masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimbench.methods.base import Unsupported
from slimbench.methods.core.architecture.anatomy import anatomy
from slimbench.methods.core.architecture.surgery import keep
from slimbench.methods.formats.architecture.structure import blocks_of


@dataclass(frozen=True)
class Stream:
    """The modules on a residual stream.

    Attributes:
        width: Features.
        embeddings: Of tokens, and of positions where there are such.
        writers: Output projections and down.
        readers: Projections to queries, keys and values, gate and up.
        norms: Of the blocks, and the last one.
        head: Reads what the last norm gives.
    """

    width: int
    embeddings: tuple[nn.Embedding, ...]
    writers: tuple[nn.Linear, ...]
    readers: tuple[nn.Linear, ...]
    norms: tuple[nn.Module, ...]
    head: nn.Linear

    @property
    def tied(self) -> bool:
        """Whether the head reads with the weight of an embedding."""
        return any(embedding.weight is self.head.weight for embedding in self.embeddings)

    @contextmanager
    def masked(self, z: Tensor) -> Iterator[None]:
        """Multiply the features by z [hidden] for a while; gradients flow to it."""
        stay = (z != 0).to(z.dtype)
        share = (stay.sum() / len(z)).detach()

        def written(_: Any, args: tuple[Tensor], made: Tensor) -> Tensor:
            return made * z.to(made.dtype)

        def entering(norm: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            x = args[0]
            if isinstance(norm, nn.LayerNorm):
                x = (x - x.sum(-1, keepdim=True) / (share * len(z))) * stay.to(x.dtype)
            return (x / share.sqrt().to(x.dtype),)

        def leaving(norm: nn.Module, args: tuple[Tensor], made: Tensor) -> Tensor:
            bias = getattr(norm, "bias", None)
            scaled = made * share.sqrt().to(made.dtype) if bias is None else (made - bias) * share.sqrt() + bias
            return scaled * z.to(made.dtype)

        placed = [module.register_forward_hook(written) for module in (*self.embeddings, *self.writers)]
        placed += [norm.register_forward_pre_hook(entering) for norm in self.norms]
        placed += [norm.register_forward_hook(leaving) for norm in self.norms]
        try:
            yield
        finally:
            for hook in placed:
                hook.remove()

    @torch.no_grad()
    def fold(self, z: Tensor) -> None:
        """Multiply z [hidden] into the weights, in place; a head that shares the weight of an embedding has it from there."""
        for embedding in self.embeddings:
            embedding.weight.mul_(z)
        for layer in self.writers:
            layer.weight.mul_(z[:, None])
            if layer.bias is not None:
                layer.bias.mul_(z)
        for layer in self.readers if self.tied else (*self.readers, self.head):
            layer.weight.mul_(z)

    def cut(self, model: Any, kept: Tensor) -> None:
        """Leave only some features, indices rising, of all that is still in the model, in place."""
        names, tied = {module: name for name, module in model.named_modules()}, self.tied
        dims: list[tuple[nn.Module, str, int]] = [(embedding, "weight", 1) for embedding in self.embeddings]
        dims += [(layer, "weight", 1) for layer in (*self.readers, self.head)]
        dims += [(layer, "weight", 0) for layer in self.writers]
        dims += [(layer, "bias", 0) for layer in self.writers if layer.bias is not None]
        dims += [(norm, leaf, 0) for norm in self.norms for leaf, _ in norm.named_parameters()]
        for module, leaf, dim in dims:
            if module in names:
                keep(model, f"{names[module]}.{leaf}", kept, self.width, dim)
        if tied:
            self.head.weight = model.get_input_embeddings().weight


def stream_of(model: Any) -> Stream:
    """The residual stream of a model.

    Raises:
        Unsupported: It is not built like Llama and OPT, or something else stands on the stream.
    """
    blocks, inside = anatomy(model), tuple(f"{name}." for name in blocks_of(model))
    width = blocks[0].attention.q.in_features
    writers = [layer for block in blocks for layer in (block.attention.out, block.mlp.down)]
    readers = [layer for block in blocks for layer in (block.attention.q, block.attention.k, block.attention.v, *block.mlp.makes)]
    head = model.get_output_embeddings()
    embeddings, norms = [], [norm for block in blocks for norm in block.norms]
    for name, module in model.named_modules():
        held = dict(module.named_parameters(recurse=False))
        if name.startswith(inside) or not held or module is head:
            continue
        if isinstance(module, nn.Embedding) and module.embedding_dim == width:
            embeddings.append(module)
        elif all(tensor.shape == (width,) for tensor in held.values()):
            norms.append(module)
        else:
            raise Unsupported(f"{type(model).__name__} has {name} on its residual stream, which is no embedding and no norm")
    if type(model.get_input_embeddings()) is not nn.Embedding or type(head) is not nn.Linear or head.bias is not None:
        raise Unsupported(f"{type(model).__name__} has no embedding and head of the usual classes")
    return Stream(width, tuple(embeddings), tuple(writers), tuple(readers), tuple(norms), head)
