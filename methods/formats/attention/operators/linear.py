"""The attention of `methods.formats.attention.linear`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter, ParameterDict, functional

from slimbench.methods.formats.attention.operators.interface import Kept, Operator, Rotary, attention, earlier_and_itself, joined, repeated
from slimbench.methods.formats.attention.policy import ALL, LEARNED

_CHUNK, _CHUNK_BY_CHANNEL = 128, 32
_LEAST = 1e-12
_ADDED = 1e-6
"""To features of which the largest is 1."""


class LinearOperator(Operator):
    """Keeps `keys` and `values` of the newest tokens, and of all older ones `state` [B, S, F, D], `norm` [B, S, F] and `top`, the logarithm
    of the factor by which both are too small: [B, S, 1], or for `efficient` [B, S, F]. Each of the S states serves H / S consecutive heads
    of queries: with learned features there is one for each, with others one for each head of keys.

    Args:
        draw: Number of random features, and their seed.
        maps: `query`, `key`, `query_bias`, `key_bias` and `gate` of learned features.
    """

    def __init__(
        self, rotary: Rotary, scaling: float, feature: str, window: int, draw: tuple[int, int], maps: Mapping[str, Tensor]
    ) -> None:
        super().__init__(rotary, scaling)
        self.feature, self.window, self.draw = feature, window, draw
        held = {name: part if isinstance(part, Parameter) else Parameter(part, requires_grad=False) for name, part in maps.items()}
        self.maps = ParameterDict(held)
        self._directions: dict[int, Tensor] = {}

    def forward(self, query: Tensor, key: Tensor, value: Tensor, kept: Kept | None) -> Tensor:
        first, tokens = self.first(query, kept), query.shape[2]
        held = kept.tensors_by_name if kept else {}
        query, key = self.rotary(query, first), self.rotary(key, first)
        if self.window >= ALL:
            keys, values = joined(held.get("keys"), key), joined(held.get("values"), value)
            if kept:
                kept.keep({"keys": keys, "values": values})
            return attention(query, keys, values, self.scaling, earlier_and_itself(first, tokens, keys.shape[2], query.device))
        found = []
        size = _CHUNK_BY_CHANNEL if self.feature == "efficient" else _CHUNK
        for begin in range(0, tokens, size):
            span = slice(begin, begin + size)
            result, held = self._chunk(query[:, :, span], key[:, :, span], value[:, :, span], held)
            found.append(result)
        if kept:
            kept.keep(held)
        return torch.cat(found, 2)

    def _chunk(self, query: Tensor, key: Tensor, value: Tensor, held: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The result for some tokens, and what is kept after them."""
        keys, values = joined(held.get("keys"), key), joined(held.get("values"), value)
        count, tokens = keys.shape[2], query.shape[2]
        states = query.shape[1] if self.feature in LEARNED else key.shape[1]
        wide, many = repeated(keys, states), repeated(values, states).float()
        at = torch.arange(count - tokens, count, device=query.device)[:, None]
        places = torch.arange(count, device=query.device)[None]
        older = places <= at - self.window
        asked, theirs = self.features(query, "query")[0].unflatten(1, (states, -1)), self.features(wide, "key")
        if self.feature == "efficient":
            result = self._efficient(asked, theirs[1], many, older, held).flatten(1, 2)
        else:
            scores = None
            if self.window:
                newest = (places <= at) & ~older
                scores = ((query @ wide.transpose(2, 3)).float() * self.scaling).masked_fill(~newest, -torch.inf)
            result = self._weighted(asked, theirs, many, older, scores, held).flatten(1, 2)
        leaving = max(0, count - self.window)
        after = self._absorbed(theirs, many, leaving, held)
        if self.window:
            after |= {"keys": keys[:, :, leaving:], "values": values[:, :, leaving:]}
        return result.to(value.dtype), after

    def _weighted(
        self,
        asked: Tensor,
        theirs: tuple[Tensor, Tensor],
        values: Tensor,
        older: Tensor,
        scores: Tensor | None,
        held: dict[str, Tensor],
    ) -> Tensor:
        """Σ a v / Σ a over the newest, the older ones that are still there, and the state: [B, S, H / S, T, D].

        Args:
            asked: Features of the queries, [B, S, H / S, T, F]; what they are multiplied with falls out.
            theirs: Features of the keys, and the logarithms of what they are multiplied with.
            values: [B, S, K, D].
            older: Which keys are older, bool [T, K].
            scores: Exponents [B, H, T, K] of the window, where there is one.
        """
        scale = _largest(theirs[1], asked.shape[3], held)[:, :, None]  # of the keys that a token sees, so that it depends on no later one
        weights = (asked @ theirs[0][:, :, None].transpose(3, 4)) * (theirs[1][:, :, None].transpose(3, 4) - scale).clamp(max=0).exp()
        weights = weights.masked_fill(~older, 0)
        if scores is not None:
            gate = torch.sigmoid(self.maps["gate"].float())[:, None, None] if "gate" in self.maps else 1.0
            weights = weights + (gate * (scores - scores.amax(-1, keepdim=True)).exp())[:, :, None]
        total, sums = weights @ values[:, :, None], weights.sum(-1, keepdim=True)
        if "state" in held:
            shrunk = (held["top"][:, :, None, None] - scale).exp()
            total = total + shrunk * (asked @ held["state"][:, :, None])
            sums = sums + shrunk * (asked @ held["norm"][:, :, None, :, None])
        least = _LEAST if self.feature == "fourier" else torch.finfo(sums.dtype).tiny
        return total / torch.where(sums.abs() < least, torch.full_like(sums, least), sums)

    def _efficient(self, asked: Tensor, logs: Tensor, values: Tensor, older: Tensor, held: dict[str, Tensor]) -> Tensor:
        """Σ_f q_f · Σ_j exp(k_jf) v_j / Σ_j exp(k_jf) over the tokens so far, [B, S, H / S, T, D].

        Args:
            asked: Softmax of the queries over channels, [B, S, H / S, T, F].
            logs: Keys [B, S, K, F].
            values: [B, S, K, D].
            older: Which of them a token sees, bool [T, K].
        """
        top = _largest(logs, asked.shape[3], held)
        grown = (logs[:, :, None] - top[:, :, :, None]).clamp(max=0).exp() * older[..., None]  # [B, S, T, K, F]
        norms = grown.sum(3)
        if "state" in held:
            shrunk = (held["top"][:, :, None] - top).exp()
            norms = norms + shrunk * held["norm"][:, :, None]
        share = asked / norms.clamp(min=_LEAST)[:, :, None]
        result = torch.einsum("bgtkf,bgrtf->bgrtk", grown, share) @ values[:, :, None]
        if "state" in held:
            result = result + (share * shrunk[:, :, None]) @ held["state"][:, :, None]
        return result

    def _absorbed(self, theirs: tuple[Tensor, Tensor], values: Tensor, leaving: int, held: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state after the first of the keys have left the window."""
        if not leaving:
            return {name: held[name] for name in ("state", "norm", "top") if name in held}
        made, logs = theirs[0][:, :, :leaving], theirs[1][:, :, :leaving]
        top = logs.amax(2)
        top = torch.maximum(top, held["top"]) if "top" in held else top
        grown = made * (logs - top[:, :, None]).exp()
        state, norm = grown.transpose(2, 3) @ values[:, :, :leaving], grown.sum(2)
        if "state" in held:
            shrunk = (held["top"] - top).exp()
            state = state + held["state"] * shrunk[..., None]
            norm = norm + held["norm"] * shrunk
        return {"state": state, "norm": norm, "top": top}

    def features(self, states: Tensor, which: str) -> tuple[Tensor, Tensor]:
        """Features [B, H, T, F] of rotated queries or keys in float32, and the logarithms of what they are to be multiplied with.

        These are [B, H, T, 1], or for keys of `efficient` [B, H, T, F].
        """
        x = states.float()
        none = x.new_zeros((*x.shape[:3], 1))
        if self.feature == "elu":
            return functional.elu(x) + 1, none
        if self.feature == "efficient":
            return (x.softmax(-1), none) if which == "query" else (torch.ones_like(x), x)
        if self.feature in LEARNED:
            turned = torch.einsum("bhtd,hdf->bhtf", x, self.maps[which].float())
            if self.feature == "relu":
                turned = turned + self.maps[f"{which}_bias"].float()[:, None]
                return functional.relu(turned).clamp(min=_LEAST), none
            return torch.cat([turned.softmax(-1), (-turned).softmax(-1)], -1).clamp(min=_LEAST), none
        x = x * self.scaling**0.5
        projected, half = x @ self.directions(x.shape[-1], x.device).T, (x * x).sum(-1, keepdim=True) / 2
        count = projected.shape[-1]
        if self.feature == "fourier":
            return torch.cat([projected.cos(), projected.sin()], -1) / count**0.5, half
        exponent = projected - half
        top = exponent.amax(-1, keepdim=True)
        return ((exponent - top).exp() + _ADDED) / count**0.5, top

    def directions(self, width: int, device: torch.device) -> Tensor:
        """ω [m, d]: rows of normal numbers, or for `positive` blocks of orthogonal rows that are as long."""
        if width not in self._directions:
            self._directions[width] = (independent if self.feature == "fourier" else orthogonal)(self.draw[0], width, self.draw[1])
        return self._directions[width].to(device)


class Unturned(Rotary):
    """Of queries and keys that are rotated already."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Identity())

    def __call__(self, states: Tensor, first: int) -> Tensor:
        return states


def _largest(logs: Tensor, tokens: int, held: dict[str, Tensor]) -> Tensor:
    """Of each of the last tokens the largest logarithm of the keys [B, H, K, F] up to it and of the state: [B, H, T, F]."""
    found = logs.cummax(2).values[:, :, -tokens:]
    return torch.maximum(found, held["top"][:, :, None]) if "top" in held else found


def independent(count: int, width: int, seed: int) -> Tensor:
    """`count` rows [count, width] of independent normal numbers."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def orthogonal(count: int, width: int, seed: int) -> Tensor:
    """`count` rows [count, width], orthogonal within each block of `width`, whose lengths are those of independent normal vectors.

    Source: Choromanski et al., arXiv 2009.14794, §2.4.
    """
    draw = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(-(-count // width)):
        factor, triangle = torch.linalg.qr(torch.randn(width, width, generator=draw))
        blocks.append((factor * triangle.diagonal().sign()).T)  # uniform over all rotations only with these signs
    lengths = torch.randn(count, width, generator=draw).norm(dim=1, keepdim=True)
    return torch.cat(blocks)[:count] * lengths
