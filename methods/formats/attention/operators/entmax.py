"""The attention of `methods.formats.attention.entmax`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from slimbench.methods.formats.attention.operators.interface import Kept, Operator, Rotary, attention, earlier_and_itself, joined, repeated

_QUERIES = 256
"""Tokens whose weights are held at once."""
_HALVINGS = 50
_LEAST = 1.001
"""A smaller α is taken for this one: powers of 1 / (α - 1) would round too much."""
_UNSEEN = -1e9


class EntmaxOperator(Operator):
    """Keeps `keys`, rotated, and `values` of all tokens.

    Args:
        alpha: α [H]; None: the softmax.
    """

    def __init__(self, rotary: Rotary, scaling: float, alpha: Tensor | None) -> None:
        super().__init__(rotary, scaling)
        self.is_base = alpha is None or bool((alpha == 1).all())
        if alpha is not None:
            self.alpha = alpha if isinstance(alpha, Parameter) else Parameter(alpha, requires_grad=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, kept: Kept | None) -> Tensor:
        first, tokens = self.first(query, kept), query.shape[2]
        held = kept.tensors_by_name if kept else {}
        keys, values = joined(held.get("keys"), self.rotary(key, first)), joined(held.get("values"), value)
        query, count = self.rotary(query, first), keys.shape[2]
        if kept:
            kept.keep({"keys": keys, "values": values})
        if self.is_base:
            return attention(query, keys, values, self.scaling, earlier_and_itself(first, tokens, count, query.device))
        keys, values = (repeated(part, query.shape[1]) for part in (keys, values))
        alpha, found = self.alpha.to(query.device).float()[:, None, None], []
        for begin in range(0, tokens, _QUERIES):
            part = query[:, :, begin : begin + _QUERIES]
            until = first + begin + part.shape[2]
            scores = (part @ keys[:, :, :until].transpose(2, 3)).float() * self.scaling
            later = torch.ones(scores.shape[2:], dtype=torch.bool, device=query.device).triu(until - part.shape[2] + 1)
            weights = entmax(scores.masked_fill(later, _UNSEEN), alpha)
            found.append(weights.to(values.dtype) @ values[:, :, :until])
        return torch.cat(found, 2)


def entmax(scores: Tensor, alpha: Tensor) -> Tensor:
    """α-entmax over the last dimension, float32.

    τ is found by bisection, and then by one step of Newton, which alone has a gradient: that of the solution, for the scores and for α.

    Args:
        scores: [..., n].
        alpha: Of a shape that goes with [..., 1].
    """
    less = alpha.clamp(min=_LEAST) - 1
    x = less * (scores - scores.detach().amax(-1, keepdim=True))
    with torch.no_grad():
        low, width = torch.full_like(x[..., :1], -1.0), 1 - x.shape[-1] ** -less
        for _ in range(_HALVINGS):
            width = width / 2
            enough = _powers(x, low + width, less).sum(-1, keepdim=True) >= 1
            low = torch.where(enough, low + width, low)
        near = (x - low).clamp(min=0)
        slope = torch.where(near > 0, near ** (1 / less - 1), 0).sum(-1, keepdim=True) / less
    threshold = low + (_powers(x, low, less).sum(-1, keepdim=True) - 1) / slope
    weights = _powers(x, threshold, less)
    return weights / weights.sum(-1, keepdim=True)


def _powers(x: Tensor, threshold: Tensor, less: Tensor) -> Tensor:
    """[x - τ]₊^(1 / (α - 1))."""
    return (x - threshold).clamp(min=0) ** (1 / less)


class Open(nn.Module):
    """α = 1 + σ(a) of what learns, a, as a parametrization of torch."""

    def forward(self, raw: Tensor) -> Tensor:
        return 1 + torch.sigmoid(raw)

    def right_inverse(self, alpha: Tensor) -> Tensor:
        return torch.logit(alpha - 1)
