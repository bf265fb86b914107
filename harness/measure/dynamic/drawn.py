"""Whether texts that were drawn are drawn from the model's own distribution, whatever guessed at them.

Tokens are counted by kinds in two ways. By rank: x lies at u = Σ_{p(y) > p(x)} p(y) + p(x) / 2 of what the model gives behind the text
before, in one of the tenths of [0, 1]. By name: the nine tokens that are expected most often in all texts, and the others. In the mean each
kind comes as often as its probabilities π tell, token by token. What counts exceed that by, d = Σ (e - π), are sums of a martingale with
the covariance V = Σ (diag π - π πᵀ), so that dᵀ V⁺ d is about χ². A greedy text, or one of another temperature, has wrong ranks. Guesses
that were taken unasked, of a draft that likes other tokens than the model, have wrong names, also where the text that they lead to hides
their ranks. Kinds of little variance count with the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.stats import chi2

RARE = 1e-5
"""Probability below which tokens are no longer taken for the model's own."""
_KINDS, _LEAST, _KEPT = 10, 20.0, 256


@dataclass
class _Counts:
    """Tokens by kind against what was to be expected of them."""

    excess: np.ndarray = field(default_factory=lambda: np.zeros(_KINDS))
    covariance: np.ndarray = field(default_factory=lambda: np.zeros((_KINDS, _KINDS)))

    def add(self, kinds: Sequence[int], expected: np.ndarray) -> None:
        """Take in tokens of kinds [n], and the probabilities [n, 10] of all kinds before each."""
        expected = expected / expected.sum(-1, keepdims=True)
        self.excess += np.bincount(kinds, minlength=_KINDS) - expected.sum(0)
        self.covariance += np.diag(expected.sum(0)) - expected.T @ expected

    @property
    def p(self) -> float | None:
        """Probability that drawn tokens lie as far from what is expected; None of tokens that are all but certain."""
        groups = self._groups()
        if len(groups) < 2:
            return None
        joined = np.array([np.isin(np.arange(_KINDS), group) for group in groups], dtype=float)
        excess, covariance = joined @ self.excess, joined @ self.covariance @ joined.T
        distance = float(excess @ np.linalg.pinv(covariance, rcond=1e-9, hermitian=True) @ excess)
        return float(chi2.sf(distance, len(groups) - 1))

    def _groups(self) -> list[list[int]]:
        """Neighbouring kinds, together of no little variance each."""
        groups, current = list[list[int]](), list[int]()
        for kind in range(_KINDS):
            current.append(kind)
            if self.covariance[np.ix_(current, current)].sum() >= _LEAST:
                groups.append(current)
                current = []
        if current and groups:
            groups[-1] += current
        return groups


@dataclass
class Drawn:
    """Drawn tokens against what was to be expected of them.

    Args:
        temperature: At which they were drawn.
    """

    temperature: float
    ranks: _Counts = field(default_factory=_Counts, init=False)
    tokens: list[int] = field(default_factory=list, init=False)
    likeliest: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list, init=False)

    def add(self, logits: torch.Tensor, tokens: torch.Tensor) -> None:
        """Take in tokens [n] and the model's logits [n, V] before each of them."""
        for row, token in zip(logits, tokens.tolist(), strict=True):
            shares, order = (row.double() / self.temperature).softmax(-1).sort(descending=True)
            tenths = ((shares.cumsum(0) - shares / 2) * _KINDS).long().clamp(max=_KINDS - 1)
            expected = torch.zeros(_KINDS, dtype=torch.float64, device=row.device).index_add_(0, tenths, shares)
            self.ranks.add([int(tenths[order == token])], expected.cpu().numpy()[None])
            self.tokens.append(token)
            self.likeliest.append((order[:_KEPT].cpu(), shares[:_KEPT].cpu()))

    @property
    def p(self) -> float | None:
        """Probability that tokens which the model draws lie as far from what is expected, by rank or by name; None of certain ones."""
        found = [p for p in (self.ranks.p, self._names().p) if p is not None]
        return min(1.0, len(found) * min(found)) if found else None

    def _names(self) -> _Counts:
        counts = _Counts()
        if not self.tokens:
            return counts
        ids, shares = (torch.stack([*part]).numpy() for part in zip(*self.likeliest, strict=True))
        often: Any = np.argsort(-np.bincount(ids.ravel(), weights=shares.ravel()), kind="stable")[: _KINDS - 1]
        named = np.stack([(shares * (ids == one)).sum(-1) for one in often], -1)
        others = np.clip(1 - named.sum(-1, keepdims=True), 0, 1)
        empty = np.zeros((len(named), _KINDS - 1 - len(often)))
        kinds = [int(np.argmax(often == token)) if token in often else _KINDS - 1 for token in self.tokens]
        counts.add(kinds, np.concatenate([named, empty, others], -1))
        return counts

    @property
    def flag(self) -> str | None:
        """One line where they do not look drawn."""
        p = self.p
        if p is None:
            moved, spread = float(np.abs(self.ranks.excess).sum()) / 2, float(self.ranks.covariance.trace())
            beyond = moved > 5 * spread**0.5 + 5
            return f"texts are not drawn from the model: {moved:.0f} tokens are none that it could draw" if beyond else None
        if p >= RARE:
            return None
        return f"texts are not drawn from the model: of its own {p:.1g} lie as far from what is expected"
