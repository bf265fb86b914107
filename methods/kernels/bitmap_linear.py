"""Weights of which only those that are not zero are stored, and the linear layer that computes with them.

A bitmap holds one bit a weight and the stored weights of all rows one after the other; where each run of four inputs has at most two
weights that are not zero, two weights and their places in the run are enough:

    bitmap   n · dtype + out · (in / 8 + 4) bytes for n stored weights
    2:4      out · in · (dtype / 2 + 1 / 8) bytes

which of bfloat16 is 0.5625 of the dense bytes at half of the weights, and for a bitmap 0.4625 at 60 % zeros, 0.3625 at 70 %. A zero comes
back as +0, whatever its sign was.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimbench.methods.kernels.cpu import sparse
from slimbench.methods.kernels.grid import two_of_four
from slimbench.util.compat.torch import buffers

EXPANDED = "expand + matmul"


@dataclass(frozen=True)
class BitmapWeight:
    """A weight [out, in] as bits and stored weights.

    Attributes:
        bits: uint8 [out, in / 8], rounded up; input i is bit i % 8 of byte i / 8, 1 where the weight is stored.
        starts: int32 [out + 1]; the weights of row o are starts[o] .. starts[o + 1] - 1.
        values: [n] in the model's dtype, by rows.
        inputs: in.
    """

    bits: Tensor
    starts: Tensor
    values: Tensor
    inputs: int

    @classmethod
    def of(cls, weight: Tensor) -> BitmapWeight:
        """The weights [out, in] that are not zero."""
        return cls.where(weight != 0, weight)

    @classmethod
    def where(cls, stored: Tensor, weight: Tensor) -> BitmapWeight:
        """The weights under a boolean mask, both [out, in]."""
        bits = _bytes(nn.functional.pad(stored, (0, -stored.shape[1] % 8)).unflatten(1, (-1, 8)))
        return cls(bits, _starts(stored), weight[stored], weight.shape[1])

    def check(self) -> None:
        """Raise `ValueError` unless the parts fit each other, so that a kernel reads nothing that is not there."""
        stored = self.stored()
        fits = self.bits.shape[1] == (self.inputs + 7) // 8 and not bool(stored[:, self.inputs :].any())
        if not fits or not torch.equal(_starts(stored), self.starts):
            raise ValueError(f"bits {list(self.bits.shape)} and their starts do not fit each other or {self.inputs} inputs")
        if self.values.shape != (int(self.starts[-1]),):
            raise ValueError(f"there are {list(self.values.shape)} stored weights in place of {int(self.starts[-1])}")

    def stored(self) -> Tensor:
        """Which weights are stored, bool [out, bytes · 8]."""
        return (self.bits.unsqueeze(-1) >> _shifts(8, self.bits) & 1).bool().flatten(1)

    def dense(self) -> Tensor:
        """The weights [out, in]."""
        weight = self.values.new_zeros(len(self.bits), self.inputs)
        return weight.masked_scatter_(self.stored()[:, : self.inputs], self.values)

    def parts(self) -> dict[str, Tensor]:
        """The tensors as they are stored, by name."""
        return {"bits": self.bits, "starts": self.starts, "values": self.values}


@dataclass(frozen=True)
class TwoOfFourWeight:
    """A weight [out, in] that has at most two weights that are not zero in each run of four inputs.

    Attributes:
        places: uint8 [out, in / 8], rounded up; four bits a run, the lower ones first: the place of its first weight, then of its second.
        values: [out, in / 2] in the model's dtype; zeros fill up a run with less than two.
    """

    places: Tensor
    values: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> TwoOfFourWeight | None:
        """None where a run has more than two weights, or runs do not tile the inputs."""
        if not two_of_four(weight):
            return None
        runs = weight.unflatten(1, (-1, 4))
        first_two = (runs == 0).to(torch.uint8).argsort(dim=-1, stable=True)[..., :2].sort(-1).values
        nibbles = (first_two[..., 0] | first_two[..., 1] << 2).to(torch.uint8)
        pairs = nn.functional.pad(nibbles, (0, nibbles.shape[1] % 2)).unflatten(1, (-1, 2))
        return cls(pairs[..., 0] | pairs[..., 1] << 4, runs.gather(-1, first_two).flatten(1))

    def check(self) -> None:
        """Raise `ValueError` unless the parts fit each other, and each run has two places in order."""
        if self.values.dim() != 2 or self.places.shape != (len(self.values), (self.values.shape[1] + 3) // 4):
            raise ValueError(f"places {list(self.places.shape)} do not fit stored weights {list(self.values.shape)}")
        places = self._places()
        if bool((places[..., 0] >= places[..., 1]).any()):
            raise ValueError("places of a run are not two in order")

    def _places(self) -> Tensor:
        """Places of both weights of each run, int64 [out, runs, 2]."""
        both = (self.places.unsqueeze(-1) >> _shifts(4, self.places) & 3).flatten(1).unflatten(1, (-1, 2))
        return both[:, : self.values.shape[1] // 2].long()

    def bitmap(self) -> BitmapWeight:
        """The same weights with a bit each, for the kernel; runs keep two stored weights."""
        places = self._places()
        runs = torch.zeros(*places.shape[:2], 4, dtype=torch.bool, device=places.device).scatter_(-1, places, True)
        weight = torch.zeros(runs.shape, dtype=self.values.dtype, device=places.device)
        return BitmapWeight.where(runs.flatten(1), weight.scatter_(-1, places, self.values.unflatten(1, (-1, 2))).flatten(1))

    def parts(self) -> dict[str, Tensor]:
        """The tensors as they are stored, by name."""
        return {"places": self.places, "values": self.values}


def smallest(weight: Tensor) -> BitmapWeight | TwoOfFourWeight | None:
    """The form of a weight [out, in] that takes the fewest bytes; None where that is the dense one."""
    forms = [form for form in (TwoOfFourWeight.of(weight), BitmapWeight.of(weight)) if form is not None]
    best = min(forms, key=nbytes)
    return best if nbytes(best) < weight.nbytes else None


def nbytes(form: BitmapWeight | TwoOfFourWeight) -> int:
    """Bytes that a weight takes on disk."""
    return sum(part.nbytes for part in form.parts().values())


class BitmapLinear(nn.Module):
    """`y = x wᵀ + b` with the weights that are not zero.

    Attributes:
        kernel: What computes the product.
        kernel_missing: Why the own kernel was not taken although it accepts the weight; None where there is no such reason.
    """

    bits: Tensor
    starts: Tensor
    values: Tensor

    def __init__(self, weight: BitmapWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = len(weight.bits), weight.inputs
        reason = sparse.missing() if sparse.accepts(weight.values) else ""
        self._own = reason is None
        self.kernel = sparse.NAME if self._own else EXPANDED
        self.kernel_missing = f"{sparse.NAME}: {reason}" if reason else None
        for name, tensor in weight.parts().items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply inputs [..., in] of the model's dtype; the result is [..., out]."""
        if not self._own:
            return nn.functional.linear(x, self.dequantize(), self.bias)
        kept = buffers(self)
        rows = x.reshape(-1, self.in_features).contiguous()
        y = torch.ops.slimbench.sparse_mm(rows, kept["bits"], kept["starts"], kept["values"])
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def dequantize(self) -> Tensor:
        """The weights [out, in] that the layer stands for."""
        return BitmapWeight(self.bits, self.starts, self.values, self.in_features).dense()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, stored={len(self.values)}, kernel={self.kernel!r}"


def _bytes(groups: Tensor) -> Tensor:
    """Booleans [..., 8] as bytes [...], the first in the lowest bit."""
    return (groups.to(torch.uint8) << _shifts(8, groups)).sum(-1, dtype=torch.uint8)


def _starts(stored: Tensor) -> Tensor:
    """Where the weights of each row begin, and where those of the last one end, int32 [out + 1], from a boolean mask [out, in]."""
    return nn.functional.pad(stored.sum(1).cumsum(0), (1, 0)).int()


def _shifts(count: int, like: Tensor) -> Tensor:
    """How far each of `count` equal fields of a byte is shifted."""
    return torch.arange(0, 8, 8 // count, dtype=torch.uint8, device=like.device)
