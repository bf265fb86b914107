"""The attention of `methods.formats.attention.latent`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from slimbench.methods.formats.attention.operators.interface import Kept, Operator, Rotary, attention, earlier_and_itself, joined


class LatentOperator(Operator):
    """Keeps `latent` [B, 1, K, r] and `rotated` [B, G, K, 2 · pairs]; without parts `keys` and `values`.

    Args:
        parts: `pairs`, `down` and `up`; empty: the attention as it was.
    """

    pairs: Tensor

    def __init__(self, rotary: Rotary, scaling: float, parts: Mapping[str, Tensor]) -> None:
        super().__init__(rotary, scaling)
        self.is_base = not parts
        if parts:
            self.register_buffer("pairs", parts["pairs"], persistent=False)
            self.down, self.up = (part if isinstance(part, Parameter) else Parameter(part, False) for part in (parts["down"], parts["up"]))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, kept: Kept | None) -> Tensor:
        first, tokens = self.first(query, kept), query.shape[2]
        held = kept.tensors_by_name if kept else {}
        if self.is_base:
            keys, values = joined(held.get("keys"), self.rotary(key, first)), joined(held.get("values"), value)
            after, query = {"keys": keys, "values": values}, self.rotary(query, first)
        else:
            turned, still = split(self.rotary(key, first), self.pairs)[0], split(key, self.pairs)[1]
            latent = (merged(still, value) @ self.down.to(value.dtype).T)[:, None]
            after = {"latent": joined(held.get("latent"), latent), "rotated": joined(held.get("rotated"), turned)}
            still, values = parted(after["latent"][:, 0] @ self.up.to(value.dtype).T, key.shape[1], still.shape[3])
            keys = torch.cat([after["rotated"], still], 3)
            chosen = self.pairs.repeat_interleave(query.shape[1] // key.shape[1], 0)
            query = torch.cat([split(self.rotary(query, first), chosen)[0], split(query, chosen)[1]], 3)
        if kept:
            kept.keep(after)
        return attention(query, keys, values, self.scaling, earlier_and_itself(first, tokens, keys.shape[2], query.device))


def split(states: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Queries or keys [B, H, T, d] as the channels of some pairs [H, n], [B, H, T, 2n], and the others, [B, H, T, d - 2n]."""
    half = states.shape[3] // 2
    chosen = torch.zeros(len(pairs), half, dtype=torch.bool, device=states.device).scatter(1, pairs.to(states.device), True)
    both = torch.cat([chosen, chosen], 1)
    places = [torch.stack([row.nonzero()[:, 0] for row in which]) for which in (both, ~both)]
    taken, left = (states.gather(3, place[None, :, None].expand(len(states), -1, states.shape[2], -1)) for place in places)
    return taken, left


def merged(still: Tensor, value: Tensor) -> Tensor:
    """Channels of keys [B, G, T, e] and values [B, G, T, d] of all heads in one vector, [B, T, G (e + d)]."""
    return torch.cat([part.transpose(1, 2).flatten(2) for part in (still, value)], 2)


def parted(joint: Tensor, groups: int, channels: int) -> tuple[Tensor, Tensor]:
    """What was `merged`: channels of keys [B, G, T, e], and values [B, G, T, d]."""
    still, value = joint.split([groups * channels, joint.shape[2] - groups * channels], 2)
    return still.unflatten(2, (groups, channels)).transpose(1, 2), value.unflatten(2, (groups, -1)).transpose(1, 2)
