"""Weighted k-means: of the numbers of each row at once, and of vectors.

In one dimension a cluster is an interval, so with the numbers of a row sorted once and their sums accumulated, a step of Lloyd's
algorithm costs one search for each boundary between two centroids, whatever the number of weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SortedRows:
    """Numbers of each row in ascending order, with running sums of weights and of weighted numbers.

    Attributes:
        values: float32 [rows, n].
        mass: float64 [rows, n + 1]; sum of the weights of the first i numbers.
        moment: The same of weight times number.
    """

    values: Tensor
    mass: Tensor
    moment: Tensor

    @classmethod
    def of(cls, x: Tensor, weights: Tensor | None = None) -> SortedRows:
        """Sort numbers [rows, n]; weights [rows, n] are not negative, those of a row all zero count as equal."""
        values, order = x.float().sort(dim=1)
        if weights is None:
            weights = torch.ones_like(values)
        else:
            weights = weights.float().gather(1, order)
            weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, torch.ones_like(weights))
        mass, moment = (torch.nn.functional.pad(t.double().cumsum(1), (1, 0)) for t in (weights, weights.double() * values))
        return cls(values, mass, moment)

    def uniform(self, levels: int) -> Tensor:
        """Centroids [rows, levels] evenly from the smallest to the largest number of non-zero weight."""
        total = self.mass[:, -1:].contiguous()
        first = torch.searchsorted(self.mass, torch.zeros_like(total), right=True) - 1
        last = torch.searchsorted(self.mass, total) - 1
        low, high = self.values.gather(1, first), self.values.gather(1, last)
        return low + (high - low) * torch.linspace(0, 1, levels, device=low.device)

    def quantiles(self, levels: int) -> Tensor:
        """Centroids [rows, levels] that are the means of intervals of equal weight."""
        shares = torch.linspace(0, 1, levels + 1, dtype=torch.float64, device=self.mass.device)[1:-1]
        ends = torch.searchsorted(self.mass, (self.mass[:, -1:] * shares).contiguous())
        return self._means(ends, self.uniform(levels))

    def step(self, centroids: Tensor) -> Tensor:
        """The mean of those nearest to each centroid; one that has none stays."""
        return self._means(self.ends(centroids), centroids)

    def ends(self, centroids: Tensor) -> Tensor:
        """How many numbers lie below the boundary between each two neighbours, [rows, levels - 1]."""
        return torch.searchsorted(self.values, boundaries(centroids))

    def squared_error(self, centroids: Tensor) -> Tensor:
        """Weighted squared distance to the nearest centroid, less that to zero; float64 [rows]."""
        mass, moment = self._sums(self.ends(centroids))
        c = centroids.double()
        return (mass * c * c - 2 * moment * c).sum(1)

    def absolute_error(self, centroids: Tensor) -> Tensor:
        """Weighted distance to the nearest centroid, float64 [rows]."""
        ends = self.ends(centroids)
        middle = torch.searchsorted(self.values, centroids.contiguous())
        cuts = torch.stack([middle[:, :-1], ends], dim=-1).flatten(1)
        mass, moment = self._sums(torch.cat([cuts, middle[:, -1:]], dim=1))
        owner = centroids.double().repeat_interleave(2, dim=1)
        sign = torch.tensor([1.0, -1.0], dtype=torch.float64, device=owner.device).repeat(centroids.shape[1])
        return (sign * (mass * owner - moment)).sum(1)

    def _sums(self, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and moment between cuts [rows, k], as [rows, k + 1]."""
        cuts = torch.nn.functional.pad(ends, (1, 1))
        cuts[:, -1] = self.values.shape[1]
        return self.mass.gather(1, cuts).diff(dim=1), self.moment.gather(1, cuts).diff(dim=1)

    def _means(self, ends: Tensor, otherwise: Tensor) -> Tensor:
        mass, moment = self._sums(ends)
        return torch.where(mass > 0, moment / mass.clamp(min=1e-300), otherwise.double()).float().sort(dim=1).values


def boundaries(centroids: Tensor) -> Tensor:
    """Midpoints [rows, levels - 1] between ascending centroids."""
    return ((centroids[:, 1:] + centroids[:, :-1]) / 2).contiguous()


def nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest of a row's ascending centroids [rows, levels] for each number [rows, n], uint8."""
    return torch.searchsorted(boundaries(centroids.float()), x.float().contiguous(), out_int32=True).to(torch.uint8)


def kmeans_rows(x: Tensor, levels: int, weights: Tensor | None = None, steps: int = 50, tolerance: float = 1e-6) -> Tensor:
    """Ascending centroids [rows, levels] for the numbers of each row [rows, n].

    Lloyd's algorithm from evenly spaced levels and from quantiles; each row keeps the better result, so none is worse than even spacing.

    Args:
        weights: Of each number in the squared error, [rows, n]; None: all equal.
        steps: At most.
        tolerance: Stop when no centroid moves by more than this fraction of its row's range.
    """
    rows = SortedRows.of(x, weights)
    span = (rows.values[:, -1] - rows.values[:, 0]).clamp(min=torch.finfo(torch.float32).tiny)
    found = []
    for centroids in (rows.uniform(levels), rows.quantiles(levels)):
        for moved in _iterate(rows, centroids, steps):
            done = ((moved - centroids).abs().amax(1) <= tolerance * span).all()
            centroids = moved
            if done:
                break
        found.append(centroids)
    better = rows.squared_error(found[0]) <= rows.squared_error(found[1])
    return torch.where(better.unsqueeze(1), found[0], found[1])


def _iterate(rows: SortedRows, centroids: Tensor, steps: int) -> Iterator[Tensor]:
    for _ in range(steps):
        centroids = rows.step(centroids)
        yield centroids


def kmeans_vectors(x: Tensor, entries: int, weights: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Centroids [entries, dim] for vectors [n, dim] with one weight each [n], by Lloyd's algorithm from a weighted random choice.

    A centroid to which no vector belongs moves to one of those with the largest error.
    """
    size = min(entries, len(x))
    weights = weights.float().clamp(min=1e-12 * float(weights.max().clamp(min=1e-30)))
    centroids = x[_weighted_choice(weights, size, generator)]
    for _ in range(steps):
        index, error = nearest_vectors(x, centroids)
        mass = weights.new_zeros(size).index_add_(0, index, weights)
        moved = torch.zeros_like(centroids).index_add_(0, index, x * weights.unsqueeze(1)) / mass.clamp(min=1e-30).unsqueeze(1)
        empty = (mass == 0).nonzero().flatten()
        if len(empty):
            moved[empty] = x[(error * weights).topk(len(empty)).indices]
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return torch.nn.functional.pad(centroids, (0, 0, 0, entries - size))


def _weighted_choice(weights: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Indices of `size` different items, drawn by weight: those with the largest of u^(1/w), u uniform (Efraimidis and Spirakis)."""
    u = torch.rand(len(weights), generator=generator, dtype=torch.float64).clamp(min=1e-300).to(weights.device)
    return (u.log() / weights.double()).topk(size).indices


def nearest_vectors(x: Tensor, centroids: Tensor, chunk_numbers: int = 1 << 22) -> tuple[Tensor, Tensor]:
    """Index, int64, of the nearest centroid [entries, dim] of each vector [n, dim], and the squared distance to it."""
    norms = (centroids * centroids).sum(1)
    index, least = [], []
    for piece in x.split(max(1, chunk_numbers // len(centroids))):
        found = torch.addmm(norms, piece, centroids.T, alpha=-2).min(1)
        index.append(found.indices)
        least.append(found.values + (piece * piece).sum(1))
    return torch.cat(index), torch.cat(least).clamp(min=0)
