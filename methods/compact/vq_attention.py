"""Transformer-VQ: keys of old tokens become codes of a book (`methods.formats.attention.vq`; Lingle, arXiv 2309.16354).

The paper trains a model with its code books. Here the book of each layer and head is the result of k-means on the keys that a pretrained
model makes of the calibration text, before they are rotated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs
from slimbench.methods.compact.content_attention import keys
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.attention.vq import VQ
from slimbench.methods.formats.policy import Acts

if TYPE_CHECKING:
    from torch import Tensor

_KEYS = 32
"""For each code, of each head."""


@dataclass(frozen=True)
class TransformerVQ(Acts, Method):
    """A state of constant size, and a window that stays exact.

    Attributes:
        codes: S, of each head of keys; at most as many as there are keys.
        exact: Newest tokens that are attended to exactly.
        steps: Of k-means.
        seed: Of the choice of keys and of its start.
    """

    name = "transformer-vq"
    slot = "attention"
    citation = Citation("Transformer-VQ", year=2023, arxiv="2309.16354")
    needs = Needs(calibration=True)
    accepts = DENSE
    produces = policies.FORMAT
    draws = True

    codes: int = 256
    exact: int = 256
    steps: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy()
        if not 1 <= self.codes <= 1 << 15:
            raise ValueError(f"codes must be in 1..{1 << 15}, not {self.codes}")
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, not {self.steps}")

    def policy(self) -> VQ:
        return VQ(self.exact)

    def check(self, shape: ModelShape) -> None:
        self.policy().check(shape)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.core.architecture.surgery import counts

        policies.fits(self.policy().neutral(), dense.path)
        model: Any = dense.load()
        size = counts(model)["parameters"]
        seed = self.seed + dense.seed
        found = keys(model, calibration.ids, self.codes * _KEYS, seed, dense.progress)
        books = {f"{layer}.codes": k_means(part.to(model.device), self.codes, self.steps, seed) for layer, part in found.items()}
        stored = {name: book.to(getattr(torch, dense.dtype)) for name, book in books.items()}
        policies.save(replace(self.policy(), books=stored), dense, out)
        added = sum(book.numel() for book in stored.values())
        return Claim(self.produces, parameters=size + added, details={"code_parameters": added})


def k_means(keys: Tensor, codes: int, steps: int, seed: int) -> Tensor:
    """Centroids [G, S, D] of the keys [G, n, D] of each head, by Lloyd's algorithm from keys that are drawn; one that has none stays."""
    import torch
    from torch.nn import functional

    from slimbench.methods.formats.attention.operators.vq import nearest

    drawn = torch.randperm(keys.shape[1], generator=torch.Generator().manual_seed(seed))[:codes]
    centroids = keys[:, drawn.to(keys.device)]
    for _ in range(steps):
        members = functional.one_hot(nearest(keys[None], centroids)[0].long(), centroids.shape[1]).float().transpose(1, 2)
        mass = members.sum(2, keepdim=True)
        moved = torch.where(mass > 0, members @ keys / mass.clamp(min=1), centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids
