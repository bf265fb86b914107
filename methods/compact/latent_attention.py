"""Latent attention put on a model that was trained without it (MHA2MLA, arXiv 2502.14837; `methods.formats.attention.latent`).

    which pairs     of each head the pairs of channels of the largest ‖q_i‖ ‖k_i‖ stay rotated, each its mean over calibration tokens   §3.1
    C, U            the r leading directions of what calibration tokens have as values and keys without position: Cᵀ = U        §3.2, joint

and then both are fitted to the attention as it was (`methods.core.learning.transfer`). The paper takes the directions from the weights,
and trains the whole model on some thousandths of its pretraining.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Citation, ModelShape, Unsupported
from slimbench.methods.core.learning.transfer import AttentionTransfer, Named
from slimbench.methods.formats.attention.latent import Latent

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LatentAttention(AttentionTransfer):
    """A latent vector in place of keys and values.

    Attributes:
        rank: Numbers of it.
        pairs: Pairs of channels of each head of keys that stay rotated.
        tokens: Calibration tokens from which pairs and directions come.
    """

    name = "latent-attention"
    slot = "cache"
    citation = Citation("MHA2MLA", year=2025, arxiv="2502.14837")
    brings = "parts"

    rank: int = 128
    pairs: int = 8
    tokens: int = 8192
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, not {self.tokens}")

    def policy(self) -> Latent:
        return Latent(self.rank, self.pairs)

    def check(self, shape: ModelShape) -> None:
        whole = shape.num_kv_heads * (2 * shape.head_dim - 2 * self.pairs)
        if 2 * self.pairs > shape.head_dim or self.rank > whole:
            raise Unsupported(f"{self.rank} numbers beside {self.pairs} rotated pairs are more than the {max(0, whole)} they stand for")

    def begin(self, model: Any, ids: Tensor) -> tuple[Named, Named]:
        """Pairs of each layer, and C and U before they are fitted."""
        import torch

        from slimbench.methods.core.learning.states import unrotated
        from slimbench.methods.formats.attention.operators.latent import merged, places, taken

        pairs: Named = {}
        directions: Named = {}
        rows = ids[: max(1, -(-self.tokens // ids.shape[1]))]
        with torch.no_grad():
            for layer, (query, key, value) in unrotated(model, rows).items():
                norms = [(part.unflatten(3, (2, -1)) ** 2).sum(3).sqrt() for part in (query, key)]  # [B, heads, T, d / 2]
                asked = norms[0].unflatten(1, (key.shape[1], -1)).mean((0, 2, 3))
                strength = asked * norms[1].mean((0, 2))
                chosen = strength.topk(self.pairs, 1).indices.sort(1).values if self.pairs else strength[:, :0].long()
                joint = merged(taken(key, places(chosen, key.shape[3])[1]), value).flatten(0, 1).double()
                _, vectors = torch.linalg.eigh(joint.T @ joint)
                basis = vectors[:, -self.rank :].flip(1).float()
                pairs[f"{layer}.pairs"] = chosen
                directions |= {f"{layer}.down": basis.T.contiguous(), f"{layer}.up": basis.contiguous()}
        return pairs, directions

    def cache_numbers(self, model: Any) -> int:
        from slimbench.methods.formats.attention.operators.interface import attentions

        return sum(self.rank + part.k_proj.out_features // part.head_dim * 2 * self.pairs for part in attentions(model))
