"""The loss as a quadratic form in the weights, block by block: what a weight costs and how others make up for it.

Where weights w change by δ, the loss changes by about ½ δᵀ F δ, with the empirical Fisher matrix of the mean loss L_i of sample i

    F = λ I + 1/m Σ_i g_i g_iᵀ        g_i = ∇L_i

of which only what lies inside blocks of B consecutive weights of a row is kept (the last block of a row is filled up with weights that
are zero and have no gradient). If the weights Q of a block go, the loss grows by

    ρ_Q = ½ w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q        at best, with        δ = - F⁻¹_:Q ([F⁻¹]_QQ)⁻¹ w_Q

which of one weight q is w_q² / 2 [F⁻¹]_qq and - w_q / [F⁻¹]_qq · F⁻¹_:q (Optimal Brain Surgeon, Hassibi and Stork 1993; of groups,
Optimal BERT Surgeon, arXiv 2203.07259). A weight that is zero already has gone: it has no gradient, comes first and stays zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slimbench.methods.core.masks import across
from slimbench.methods.core.statistics import gradients
from slimbench.methods.core.walk import Progress, passes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MEMORY = 8e9  # bytes for matrices of blocks at once
_SAMPLES = 8  # whose gradients are added at once
_CHUNK = 8192  # blocks that are inverted at once, in float64


@dataclass(frozen=True)
class Blocks:
    """How a matrix is cut, and what goes together.

    Attributes:
        size: B.
        dampening: λ.
        group: Consecutive weights that go together; divides `size` and the inputs of each layer.
        joint: All weights of a block that go are made up for together, as if one went after the other. Otherwise each group by itself,
            and their updates are added.
    """

    size: int
    dampening: float
    group: int = 1
    joint: bool = True

    def cut(self, values: Tensor) -> Tensor:
        """Numbers [..., out, in] of the weights of a layer as blocks [..., n, B]."""
        padded = nn.functional.pad(values, (0, -values.shape[-1] % self.size))
        return padded.reshape(*values.shape[:-2], -1, self.size)

    def joined(self, blocks: Tensor, outputs: int, inputs: int) -> Tensor:
        """The reverse: [out, in] of one number a weight or a group."""
        return blocks.reshape(outputs, -1)[:, :inputs]

    def measure(self, model: PreTrainedModel, layers: Mapping[str, nn.Linear], ids: Tensor, progress: Progress) -> dict[str, Tensor]:
        """F of each layer, float32 [n, B, B].

        Args:
            ids: Tokens, int64 [m, length].
        """
        start = self.dampening * torch.eye(self.size, device=model.device)
        found = {name: start.repeat(len(self.cut(layer.weight.detach())), 1, 1) for name, layer in layers.items()}
        held: list[tuple[Tensor, ...]] = []
        for done, of_sample in enumerate(gradients(model, list(layers.values()), ids, progress)):
            held.append(of_sample)
            if len(held) == _SAMPLES or done + 1 == len(ids):
                for (name, layer), slopes in zip(layers.items(), zip(*held, strict=True), strict=True):
                    slope = self.cut(torch.stack(slopes).float().masked_fill(layer.weight.detach() == 0, 0.0))
                    found[name].baddbmm_(slope.permute(1, 2, 0), slope.transpose(0, 1), alpha=1 / len(ids))
                held.clear()
        return found

    def saliency(self, weight: Tensor, fisher: Tensor) -> Tensor:
        """ρ of each group, float32 [out, in / group]; below all others where it is zero already."""
        costs = []
        with _one_thread():
            for w, matrix in zip(self.cut(weight).split(_CHUNK), fisher.split(_CHUNK), strict=True):
                pull = self._pull(w := w.double(), _inverse(matrix.double()))
                costs.append(0.5 * (w * pull).unflatten(1, (-1, self.group)).sum(-1))
        found = self.joined(torch.cat(costs).float(), len(weight), weight.shape[1] // self.group)
        return found.masked_fill((weight == 0).unflatten(1, (-1, self.group)).all(-1), -torch.inf)

    def updated(self, weight: Tensor, fisher: Tensor, gone: Tensor) -> Tensor:
        """A weight [out, in] without what goes, and with what the others make up for it; float32.

        Args:
            gone: Boolean [out, in], whole groups.
        """
        changes = []
        change = self._solved if self.joint else self._added
        with _one_thread():
            for w, matrix, mask in zip(*(part.split(_CHUNK) for part in (self.cut(weight), fisher, self.cut(gone))), strict=True):
                changes.append(change(w.double(), matrix.double(), mask))
        total = self.joined(torch.cat(changes).float(), *weight.shape)
        return (weight.float() + total).masked_fill(gone, 0.0)

    def _added(self, weight: Tensor, fisher: Tensor, gone: Tensor) -> Tensor:
        """- F⁻¹_:Q ([F⁻¹]_QQ)⁻¹ w_Q of each group by itself, added: [n, B]."""
        inverse = _inverse(fisher)
        return -(inverse @ (self._pull(weight, inverse) * gone).unsqueeze(-1)).squeeze(-1)

    def _solved(self, weight: Tensor, fisher: Tensor, gone: Tensor) -> Tensor:
        """The same with all that goes as one Q: of what is left, K, it is (F_KK)⁻¹ F_KQ w_Q, [n, B]."""
        pull = (fisher @ (weight * gone).unsqueeze(-1)).masked_fill(gone.unsqueeze(-1), 0.0)
        left = ~gone.unsqueeze(1) & ~gone.unsqueeze(2)
        system = fisher.where(left, torch.eye(self.size, dtype=fisher.dtype, device=fisher.device))
        return torch.cholesky_solve(pull, torch.linalg.cholesky(system)).squeeze(-1)

    def _pull(self, weight: Tensor, inverse: Tensor) -> Tensor:
        """([F⁻¹]_QQ)⁻¹ w_Q of each group by itself, [n, B]."""
        if self.group == 1:
            return weight / inverse.diagonal(dim1=1, dim2=2)
        squares = inverse.unflatten(2, (-1, self.group)).unflatten(1, (-1, self.group)).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        return torch.linalg.solve(squares, weight.unflatten(1, (-1, self.group)).unsqueeze(-1)).flatten(1)


def prune(
    model: PreTrainedModel, layers: Mapping[str, nn.Linear], ids: Tensor, sparsity: float, blocks: Blocks, progress: Progress
) -> dict[str, Tensor]:
    """Set the weights of lowest ρ among those of all layers to zero, and let the others make up for them, in place.

    A few layers are measured at a time, all of them on the weights as they were: twice, unless they fit into memory together.

    Args:
        ids: Tokens, int64 [m, length].
        sparsity: Of all layers together; exact to a group.

    Returns:
        What went, boolean [out, in] by layer.
    """
    parts = divided(layers, 4 * blocks.size + 4 * _SAMPLES)
    reports = iter(passes(progress, 1 if len(parts) == 1 else 2 * len(parts)))
    costs: dict[str, Tensor] = {}
    fisher: dict[str, Tensor] = {}
    for part in parts:
        fisher.clear()
        fisher |= blocks.measure(model, part, ids, next(reports))
        costs |= {name: blocks.saliency(layer.weight.detach(), fisher[name]) for name, layer in part.items()}
    chosen = across(costs, round(sparsity * sum(cost.numel() for cost in costs.values())))
    gone = {name: mask.repeat_interleave(blocks.group, 1) for name, mask in chosen.items()}
    updated: dict[str, Tensor] = {}
    for part in parts:
        if len(parts) > 1:
            fisher.clear()
            fisher |= blocks.measure(model, part, ids, next(reports))
        for name, layer in part.items():
            updated[name] = blocks.updated(layer.weight.detach(), fisher[name], gone[name]).to(layer.weight.dtype)
    for name, layer in layers.items():
        layer.weight.data.copy_(updated[name])
    return gone


def diagonal(model: PreTrainedModel, layers: Mapping[str, nn.Linear], ids: Tensor, progress: Progress) -> dict[str, Tensor]:
    """The diagonal of 1/m Σ_i g_i g_iᵀ by layer, float32 [out, in], over tokens [m, length]."""
    found = {name: torch.zeros(layer.weight.shape, device=layer.weight.device) for name, layer in layers.items()}
    for of_sample in gradients(model, list(layers.values()), ids, progress):
        for total, slope in zip(found.values(), of_sample, strict=True):
            total += slope.float().square() / len(ids)
    return found


def divided(layers: Mapping[str, nn.Linear], bytes_of_weight: int) -> list[dict[str, nn.Linear]]:
    """Layers in the fewest runs that take so many bytes of memory for each weight, a layer at least."""
    parts: list[dict[str, nn.Linear]] = []
    held = _MEMORY
    for name, layer in layers.items():
        size = bytes_of_weight * layer.weight.numel()
        if held + size > _MEMORY:
            parts.append({})
            held = 0
        parts[-1][name] = layer
        held += size
    return parts


def _inverse(matrices: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(matrices))


@contextmanager
def _one_thread() -> Iterator[None]:
    """For many small matrices, at each of which threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
