"""The attention of `methods.formats.attention.vq`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter, functional

from slimbench.methods.formats.attention.operators.interface import Kept, Operator, Rotary, joined, repeated
from slimbench.methods.formats.attention.operators.pooled import base
from slimbench.methods.formats.attention.policy import ALL

_CHUNK = 128


class VQOperator(Operator):
    """Keeps of the newest tokens `keys`, rotated, `values` and `places` [B, G, K], the codes of their keys, and of all older ones `counts`
    [B, G, S, 1] and `sums` of values [B, G, S, D], both in float32.

    Args:
        codes: [G, S, D]; None where no token is old.
    """

    def __init__(self, rotary: Rotary, scaling: float, exact: int, codes: Tensor | None) -> None:
        super().__init__(rotary, scaling)
        if codes is None and exact < ALL:
            raise ValueError("there are no codes for this layer")
        self.exact = exact
        self.codes = None if codes is None else Parameter(codes, requires_grad=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, kept: Kept | None) -> Tensor:
        if self.exact >= ALL or self.codes is None:
            return base(self, query, key, value, kept)
        first, held = self.first(query, kept), dict(kept.tensors_by_name) if kept else {}
        far = torch.full((query.shape[2],), self.exact, device=query.device)
        asked, places = (self.rotary(query, first), self.rotary.at(query, far)), nearest(key, self.codes)
        key = self.rotary(key, first)
        here = torch.zeros(self.codes.shape[1], dtype=far.dtype, device=query.device)
        codes = repeated(self.rotary.at(self.codes[None].to(key.dtype), here), query.shape[1])
        found = []
        for begin in range(0, query.shape[2], _CHUNK):
            cut = slice(begin, begin + _CHUNK)
            for name, part in (("keys", key), ("values", value), ("places", places)):
                held[name] = joined(held.get(name), part[:, :, cut])
            found.append(self._chunk(asked[0][:, :, cut], asked[1][:, :, cut] @ codes.transpose(2, 3), held))
            held = self._absorbed(held)
        if kept:
            kept.keep(held)
        return torch.cat(found, 2)

    def _chunk(self, query: Tensor, products: Tensor, held: dict[str, Tensor]) -> Tensor:
        """The result for some tokens, the newest of those that are held.

        Args:
            query: Rotated.
            products: Of the queries with all codes, [B, H, T, S].
        """
        heads, tokens, count = query.shape[1], query.shape[2], held["keys"].shape[2]
        keys, values = (repeated(held[name], heads) for name in ("keys", "values"))
        at = torch.arange(count - tokens, count, device=query.device)[:, None]
        others = torch.arange(count, device=query.device)[None]
        products = products.float()
        theirs = repeated(held["places"], heads).long()[:, :, None].expand(-1, -1, tokens, -1)
        scores = torch.where(others > at - self.exact, (query @ keys.transpose(2, 3)).float(), products.gather(3, theirs))
        scores, many = (scores * self.scaling).masked_fill(others > at, -torch.inf), values.float()
        if "counts" in held:
            counts, sums = (repeated(held[name], heads) for name in ("counts", "sums"))
            scores = torch.cat([scores, products * self.scaling + counts.log().transpose(2, 3)], 3)
            many = torch.cat([many, sums / counts.clamp(min=1)], 2)
        return (torch.softmax(scores, -1) @ many).to(values.dtype)

    def _absorbed(self, held: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is kept once the next token is about to come: older ones have gone to their codes."""
        gone = held["keys"].shape[2] - self.exact + 1
        if gone <= 0 or self.codes is None:
            return held
        of_code = functional.one_hot(held["places"][:, :, :gone].long(), self.codes.shape[1]).transpose(2, 3).float()
        made = {"counts": of_code.sum(3, keepdim=True), "sums": of_code @ held["values"][:, :, :gone].float()}
        older = {name: held[name] + part if name in held else part for name, part in made.items()}
        newest = ((name, held[name][:, :, gone:]) for name in ("keys", "values", "places"))
        return older | {name: part.clone(memory_format=torch.contiguous_format) for name, part in newest}


def nearest(keys: Tensor, codes: Tensor) -> Tensor:
    """Of keys [B, G, T, D] the nearest of the codes [G, S, D] of their head, int16 [B, G, T]."""
    codes = codes.float()
    distances = (codes * codes).sum(-1)[:, None] - 2 * keys.float() @ codes.transpose(1, 2)
    return distances.argmin(-1).to(torch.int16)
