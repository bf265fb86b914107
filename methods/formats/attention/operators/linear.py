"""The attention of `methods.formats.attention.linear`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter, ParameterDict, functional

from slimbench.methods.formats.attention.operators.interface import Kept, Operator, Rotary, attention, earlier_and_itself, joined, repeated
from slimbench.methods.formats.attention.policy import ALL

_CHUNK, _CHUNK_BY_CHANNEL = 128, 32
_LEAST = 1e-12


class LinearOperator(Operator):
    """Keeps `keys` and `values` of the newest tokens, and of all older ones `state` [B, H, F, D], `norm` [B, H, F] and `top`, the logarithm
    of the factor by which both are too small: [B, H, 1], or for `efficient` [B, H, F].

    Args:
        draw: Number of random features, and their seed.
        maps: `query`, `key` and `gate` of learned features.
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
        count, tokens, heads = keys.shape[2], query.shape[2], query.shape[1]
        wide, many = repeated(keys, heads), repeated(values, heads).float()
        at = torch.arange(count - tokens, count, device=query.device)[:, None]
        places = torch.arange(count, device=query.device)[None]
        older = places <= at - self.window
        asked, theirs = self.features(query, "query"), self.features(wide, "key")
        if self.feature == "efficient":
            result = self._efficient(asked[0], theirs[1], many, older, held)
        else:
            result = self._weighted(query, wide, asked, theirs, many, (older, (places <= at) & ~older), held)
        leaving = max(0, count - self.window)
        after = self._absorbed(theirs, many, leaving, held)
        if self.window:
            after |= {"keys": keys[:, :, leaving:], "values": values[:, :, leaving:]}
        return result.to(value.dtype), after

    def _weighted(
        self,
        query: Tensor,
        keys: Tensor,
        asked: tuple[Tensor, Tensor],
        theirs: tuple[Tensor, Tensor],
        values: Tensor,
        seen: tuple[Tensor, Tensor],
        held: dict[str, Tensor],
    ) -> Tensor:
        """Σ a v / Σ a over the newest, the older ones that are still there, and the state.

        Args:
            asked: Features of the queries; what they are multiplied with falls out.
            theirs: Features of the keys, and the logarithms of what they are multiplied with.
            seen: Which keys are older, and which are in the window, bool [T, K].
        """
        older, newest = seen
        scale = _largest(theirs[1], query.shape[2], held)  # of the keys that a token sees, so that it depends on no later one
        weights = (asked[0] @ theirs[0].transpose(2, 3)) * (theirs[1].transpose(2, 3) - scale).clamp(max=0).exp()
        weights = weights.masked_fill(~older, 0)
        if self.window:
            scores = ((query @ keys.transpose(2, 3)).float() * self.scaling).masked_fill(~newest, -torch.inf)
            gate = torch.sigmoid(self.maps["gate"].float())[:, None, None] if "gate" in self.maps else 1.0
            weights = weights + gate * (scores - scores.amax(-1, keepdim=True)).exp()
        total, sums = weights @ values, weights.sum(-1, keepdim=True)
        if "state" in held:
            shrunk = (held["top"][..., None] - scale).exp()
            total = total + shrunk * (asked[0] @ held["state"])
            sums = sums + shrunk * (asked[0] @ held["norm"][..., None])
        return total / torch.where(sums.abs() < _LEAST, torch.full_like(sums, _LEAST), sums)

    def _efficient(self, asked: Tensor, logs: Tensor, values: Tensor, older: Tensor, held: dict[str, Tensor]) -> Tensor:
        """Σ_f q_f · Σ_j exp(k_jf) v_j / Σ_j exp(k_jf) over the tokens so far.

        Args:
            asked: Softmax of the queries over channels, [B, H, T, F].
            logs: Keys [B, H, K, F].
            older: Which of them a token sees, bool [T, K].
        """
        top = _largest(logs, asked.shape[2], held)
        grown = (logs[:, :, None] - top[:, :, :, None]).clamp(max=0).exp() * older[..., None]  # [B, H, T, K, F]
        norms = grown.sum(3)
        if "state" in held:
            shrunk = (held["top"][:, :, None] - top).exp()
            norms = norms + shrunk * held["norm"][:, :, None]
        share = asked / norms.clamp(min=_LEAST)
        result = torch.einsum("bhtkf,bhtf->bhtk", grown, share) @ values
        if "state" in held:
            result = result + (share * shrunk) @ held["state"]
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
        if self.feature in ("relu", "hedgehog"):
            turned = torch.einsum("bhtd,hdf->bhtf", x, self.maps[which].float())
            if self.feature == "relu":
                return functional.relu(turned).clamp(min=_LEAST), none
            return torch.cat([turned.softmax(-1), (-turned).softmax(-1)], -1).clamp(min=_LEAST), none
        x = x * self.scaling**0.5
        projected, half = x @ self.directions(x.shape[-1], x.device).T, (x * x).sum(-1, keepdim=True) / 2
        count = projected.shape[-1]
        if self.feature == "fourier":
            return torch.cat([projected.cos(), projected.sin()], -1) / count**0.5, half
        exponent = projected - half
        top = exponent.amax(-1, keepdim=True)
        return (exponent - top).exp() / count**0.5, top

    def directions(self, width: int, device: torch.device) -> Tensor:
        """ω [m, d]: blocks of orthogonal rows, as long as rows of normal numbers are."""
        if width not in self._directions:
            self._directions[width] = orthogonal(self.draw[0], width, self.draw[1])
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
