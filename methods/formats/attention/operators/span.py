"""The attention of `methods.formats.attention.span`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import Parameter, functional

from slimbench.methods.formats.attention.operators.interface import Kept, Operator, Rotary, attention, earlier_and_itself, joined, repeated
from slimbench.methods.formats.attention.policy import ALL

_QUERIES = 256
"""Tokens whose masks are held at once."""


class SpanOperator(Operator):
    """Keeps `keys`, rotated, and `values` of as many of the newest tokens as the longest span reaches back.

    Args:
        span: z [H]; a parameter stays the same one, so that it can learn. None: no end.
        ramp: R.
    """

    def __init__(self, rotary: Rotary, scaling: float, span: Tensor | None, ramp: int) -> None:
        super().__init__(rotary, scaling)
        self.ramp = ramp
        self.span = span if span is None or isinstance(span, Parameter) else Parameter(span, requires_grad=False)
        self._reach = ALL if span is None else reached(span, ramp)

    @property
    def reach(self) -> int:
        """Tokens before a token of which some head sees the first."""
        return reached(self.span, self.ramp) if self.span is not None and self.span.requires_grad else self._reach

    def forward(self, query: Tensor, key: Tensor, value: Tensor, kept: Kept | None) -> Tensor:
        first, tokens, reach = self.first(query, kept), query.shape[2], self.reach
        held = kept.tensors_by_name if kept else {}
        keys, values = joined(held.get("keys"), self.rotary(key, first)), joined(held.get("values"), value)
        query, count = self.rotary(query, first), keys.shape[2]
        if kept:
            gone = max(0, count - reach)
            kept.keep({"keys": keys[:, :, gone:], "values": values[:, :, gone:]})
        if self.span is None:
            return attention(query, keys, values, self.scaling, earlier_and_itself(first, tokens, count, query.device))
        keys, values = (repeated(part, query.shape[1]) for part in (keys, values))
        found = []
        for begin in range(0, tokens, _QUERIES):
            part = query[:, :, begin : begin + _QUERIES]
            until = count - tokens + begin + part.shape[2]
            low = max(0, until - part.shape[2] - reach)
            mask = self._mask(part.shape[2], until - low, query.device).to(query.dtype)
            near, made = keys[:, :, low:until], values[:, :, low:until]
            found.append(functional.scaled_dot_product_attention(part, near, made, attn_mask=mask, scale=self.scaling))
        return torch.cat(found, 2)

    def _mask(self, tokens: int, keys: int, device: torch.device) -> Tensor:
        """ln m [1, H, T, K], which is added to the exponents of the softmax; the tokens are the last of the keys."""
        assert self.span is not None
        distance = torch.arange(keys - tokens, keys, device=device)[:, None] - torch.arange(keys, device=device)
        share = ((self.ramp + self.span.to(device).float()[:, None, None] - distance) / self.ramp).clamp(0, 1)
        unseen = (share <= 0) | (distance < 0)
        return share.masked_fill(unseen, 1).log().masked_fill(unseen, -torch.inf)[None]


def reached(span: Tensor, ramp: int) -> int:
    """Tokens before a token that the head of the longest span sees: m(x) > 0 where x < z + R."""
    return math.ceil(float(span.detach().max()) + ramp) - 1
