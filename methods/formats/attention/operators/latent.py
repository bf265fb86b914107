"""The attention of `methods.formats.attention.latent`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter, functional

from slimbench.methods.formats.attention.operators.interface import Kept, Operator, Rotary, attention, earlier_and_itself, joined

_FEW = 16
"""New tokens that attend to the latent vectors themselves; for more it is less work to make keys and values of these."""


class LatentOperator(Operator):
    """Keeps `latent` [B, 1, K, r + G · 2 · pairs], c and the rotated channels of all heads; without parts `keys` and `values`.

    For few new tokens nothing is read but these: of head h, which asks the keys of head g,

        ⟨[R q, q'], [R k, U_k c]⟩ = ⟨[U_kᵀ q', 0, …, R q, …, 0], [c, R k of all heads]⟩        Σ a U_v c = U_v Σ a c

    with q' the channels that are not rotated, and R q at the place of g.

    Args:
        parts: `pairs`, `down` and `up`; empty: the attention as it was.
    """

    turned: Tensor
    still: Tensor

    def __init__(self, rotary: Rotary, scaling: float, parts: Mapping[str, Tensor]) -> None:
        super().__init__(rotary, scaling)
        self.is_base = not parts
        if parts:
            groups, count = parts["pairs"].shape
            turned, still = places(parts["pairs"], parts["up"].shape[0] // (2 * groups) + count)
            self.register_buffer("turned", turned, persistent=False)
            self.register_buffer("still", still, persistent=False)
            self.down, self.up = (part if isinstance(part, Parameter) else Parameter(part, False) for part in (parts["down"], parts["up"]))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, kept: Kept | None) -> Tensor:
        first, tokens = self.first(query, kept), query.shape[2]
        held = kept.tensors_by_name if kept else {}
        if self.is_base:
            keys, values = joined(held.get("keys"), self.rotary(key, first)), joined(held.get("values"), value)
            if kept:
                kept.keep({"keys": keys, "values": values})
            seen = earlier_and_itself(first, tokens, keys.shape[2], query.device)
            return attention(self.rotary(query, first), keys, values, self.scaling, seen)
        made = merged(taken(key, self.still), value) @ self.down.to(value.dtype).T
        turned = taken(self.rotary(key, first), self.turned).transpose(1, 2).flatten(2)
        latent = joined(held.get("latent"), torch.cat([made, turned], 2)[:, None])
        if kept:
            kept.keep({"latent": latent})
        share = query.shape[1] // key.shape[1]
        turned, still = (place.repeat_interleave(share, 0) for place in (self.turned, self.still))
        asked = taken(self.rotary(query, first), turned), taken(query, still) * self.rotary.factor**2
        count = latent.shape[2]
        seen = earlier_and_itself(first, tokens, count, query.device)
        if tokens < count and tokens <= _FEW:
            return self._few(*asked, latent, seen)
        keys, values = self._read(latent)
        return attention(torch.cat(asked, 3), keys, values, self.scaling, seen)

    def _read(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, G, K, D], rotated channels first, and values [B, G, K, D]."""
        rank, (groups, channels) = self.up.shape[1], self.still.shape
        still, values = parted(latent[:, 0, :, :rank] @ self.up.to(latent.dtype).T, groups, channels)
        turned = latent[:, 0, :, rank:].unflatten(2, (groups, -1)).transpose(1, 2)
        return torch.cat([turned, still], 3), values

    def _few(self, turned: Tensor, still: Tensor, latent: Tensor, seen: Tensor | None) -> Tensor:
        """The attention of a few tokens, over what is kept as it is.

        Args:
            turned: Rotated channels of the queries, [B, H, T, 2 · pairs].
            still: The others, [B, H, T, E].
            seen: Whether a token sees others, bool [T, K]; None: all.
        """
        (heads, tokens), rank, (groups, channels) = turned.shape[1:3], self.up.shape[1], self.still.shape
        up = self.up.to(latent.dtype)
        to_keys, to_values = (part.unflatten(0, (groups, -1)) for part in (up[: groups * channels], up[groups * channels :]))
        inward = torch.einsum("bgstc,gcr->bgstr", still.unflatten(1, (groups, -1)), to_keys)
        own = torch.eye(groups, dtype=turned.dtype, device=turned.device)[:, None, None, :, None]
        spread = (turned.unflatten(1, (groups, -1))[:, :, :, :, None] * own).flatten(4)
        asked = torch.cat([inward, spread], 4).flatten(1, 3)[:, None]
        mask = None if seen is None else seen.repeat(heads, 1)
        read = functional.scaled_dot_product_attention(asked, latent, latent[..., :rank], attn_mask=mask, scale=self.scaling)
        read = read[:, 0].unflatten(1, (groups, heads // groups, tokens))
        return torch.einsum("bgstr,gdr->bgstd", read, to_values).flatten(1, 2)


def places(pairs: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The channels of some pairs [H, n], int64 [H, 2n], and the others, [H, width - 2n], ascending."""
    chosen = torch.zeros(len(pairs), width // 2, dtype=torch.bool, device=pairs.device).scatter(1, pairs, True)
    both = torch.cat([chosen, chosen], 1)
    return both.nonzero()[:, 1].view(len(pairs), -1), (~both).nonzero()[:, 1].view(len(pairs), -1)


def taken(states: Tensor, channels: Tensor) -> Tensor:
    """Channels [H, n] of queries or keys [B, H, T, d]: [B, H, T, n]."""
    return states.gather(3, channels[None, :, None].expand(len(states), -1, states.shape[2], -1))


def merged(still: Tensor, value: Tensor) -> Tensor:
    """Channels of keys [B, G, T, e] and values [B, G, T, d] of all heads in one vector, [B, T, G (e + d)]."""
    return torch.cat([part.transpose(1, 2).flatten(2) for part in (still, value)], 2)


def parted(joint: Tensor, groups: int, channels: int) -> tuple[Tensor, Tensor]:
    """What was `merged`: channels of keys [B, G, T, e], and values [B, G, T, d]."""
    still, value = joint.split([groups * channels, joint.shape[2] - groups * channels], 2)
    return still.unflatten(2, (groups, channels)).transpose(1, 2), value.unflatten(2, (groups, -1)).transpose(1, 2)
