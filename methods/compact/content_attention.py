"""Attention to tokens that are chosen by their content (`methods.formats.attention.content`), laid on a model that was trained with all.

The papers train their models with it. The whole cache stays: a new token reads fewer keys, and none is freed. The centroids of the Routing
Transformer, which its authors let follow the queries and keys in training, are fitted here to the keys of calibration text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, Needs, Unsupported
from slimbench.methods.core.policies import PolicyMethod
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.attention.content import Lsh, Routing, Sinkhorn
from slimbench.methods.formats.policy import Acts, Policy

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.core.walk import Progress


@dataclass(frozen=True)
class Reformer(PolicyMethod):
    """Reformer: a token sees those whose key has the hash of its query.

    Attributes:
        rounds: Hashes of a vector, of which one must agree.
        buckets: Values of a hash.
        local: Tokens of a chunk, of which one's own and the one before are always seen; 0: none.
        seed: Of the directions of the hashes.
    """

    name = "reformer"
    slot = "attention"
    citation = Citation("Reformer", year=2020, arxiv="2001.04451")
    draws = True

    rounds: int = 4
    buckets: int = 32
    local: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy()

    def policy(self, seed: int = 0) -> Policy:
        return Lsh(self.rounds, self.buckets, self.local, self.seed + seed)


@dataclass(frozen=True)
class SinkhornAttention(PolicyMethod):
    """Sparse Sinkhorn attention: a block of tokens sees itself and the blocks that it is matched with.

    Attributes:
        block: Tokens of a block.
        blocks: Earlier blocks that it is matched with.
        iterations: Of the normalisation of rows and columns of scores.
        temperature: Scores of blocks are divided by it.
    """

    name = "sinkhorn"
    slot = "attention"
    citation = Citation("Sparse Sinkhorn Attention", year=2020, arxiv="2002.11296")

    block: int = 64
    blocks: int = 4
    iterations: int = 7
    temperature: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        self.policy()

    def policy(self, seed: int = 0) -> Policy:
        return Sinkhorn(self.block, self.blocks, self.iterations, self.temperature)


@dataclass(frozen=True)
class RoutingTransformer(Acts, Method):
    """Routing Transformer: a token sees the newest, and those whose key belongs to the centroid of its query.

    Attributes:
        centroids: Of each head of keys.
        window: Newest tokens that are always seen, the token itself among them.
        samples: Calibration tokens to whose keys the centroids are fitted, at most.
        steps: Of k-means.
        seed: Of the choice of tokens and of the first centroids.
    """

    name = "routing-transformer"
    slot = "attention"
    citation = Citation("Routing Transformer", year=2020, arxiv="2003.05997")
    needs = Needs(calibration=True)
    accepts = DENSE
    produces = policies.FORMAT
    draws = True

    centroids: int = 16
    window: int = 128
    samples: int = 8192
    steps: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.centroids <= self.samples or self.steps < 1:
            raise ValueError(
                f"centroids must be from 1 to samples and steps at least 1, not {self.centroids} of {self.samples} and {self.steps}"
            )
        self.policy()

    def policy(self) -> Routing:
        return Routing(self.window)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        if calibration.ids.numel() < self.centroids:
            raise Unsupported(f"{calibration.ids.numel()} calibration tokens are fewer than {self.centroids} centroids")
        policies.fits(self.policy().neutral(), dense.path)
        model, seed = dense.load(), self.seed + dense.seed
        found = keys(model, calibration.ids, self.samples, seed, dense.progress)
        means = {str(layer): spherical_means(part, self.centroids, self.steps, seed) for layer, part in found.items()}
        policies.save(replace(self.policy(), means=means), dense, out)
        return Claim(self.produces, details={"centroid_numbers": sum(part.numel() for part in means.values())})


def keys(model: Any, ids: Tensor, samples: int, seed: int, progress: Progress | None = None) -> dict[int, Tensor]:
    """Keys [key-value heads, samples, D] of some tokens, not rotated, by layer.

    Args:
        ids: Texts [N, T], of whose tokens as many are drawn.
    """
    import torch

    from slimbench.methods.core.learning.states import unrotated
    from slimbench.methods.core.walk import batches

    chosen = torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(seed))[:samples].sort().values
    found: dict[int, list[Tensor]] = {}
    begin = 0
    for batch in batches(ids, model.device, progress):
        here = chosen[(chosen >= begin) & (chosen < begin + batch.numel())] - begin
        begin += batch.numel()
        for layer, (_, key, _) in unrotated(model, batch).items():
            found.setdefault(layer, []).append(key.transpose(1, 2).flatten(0, 1)[here.to(key.device)].float().cpu())
    return {layer: torch.cat(parts).transpose(0, 1) for layer, parts in found.items()}


def spherical_means(vectors: Tensor, count: int, steps: int, seed: int) -> Tensor:
    """Centroids of unit length [G, C, D] of vectors [G, n, D] by k-means with their angles; one that is nearest to none stays.

    Source: Dhillon and Modha, Concept decompositions for large sparse text data using clustering, 2001.
    """
    import torch
    from torch.nn import functional

    unit = functional.normalize(vectors.float(), dim=-1)
    means = unit[:, torch.randperm(unit.shape[1], generator=torch.Generator().manual_seed(seed))[:count]]
    for _ in range(steps):
        nearest = functional.one_hot((unit @ means.mT).argmax(-1), count).to(unit.dtype)
        sums = nearest.mT @ unit
        means = torch.where(nearest.sum(1)[..., None] > 0, functional.normalize(sums, dim=-1), means)
    return means
