"""The linear layer that computes with packed weights, and the kernels behind it.

A weight `w[o, i]` is an integer code `q` on a grid that it shares with its group of inputs:

    w = (q - mid) * scale + offset          mid = 8 for 4 bits, 0 for 8 bits; no offset on a symmetric grid

Only the bytes that the kernel reads are kept in memory. The kernel is chosen once, when the layer is made, and `kernel` names it:

    torch int4pack          4 bits, CPU, bfloat16, out a multiple of 16
    tinygemm                4 bits, CUDA from compute capability 8, bfloat16, out a multiple of 8, in a multiple of 32
    torch int8pack          8 bits, one scale a row, CPU, bfloat16, in a multiple of 16
    torch int_mm w8a8       8 bits and 8-bit inputs, one scale a row, in and out multiples of 8
    dequantize + matmul     everything else: the weight is expanded on every call

Weight-only grids in float16 and float32 take the last one on a CPU: torch's packed operators accept those dtypes, but run scalar
loops that are many times slower than a dense product. Its 8-bit operator reads beyond rows whose length is no multiple of 16.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

GROUP_SIZES = (32, 64, 128, 256)
_MID = {4: 8, 8: 0}
_ACTIVATION_MAX = 127.0
_CUDA_INT_MM_ROWS = 17


@dataclass(frozen=True)
class Grid:
    """How the weights of a layer are laid out: bits of a code, inputs that share a scale (None: a row), bits of the inputs."""

    bits: Literal[4, 8]
    group_size: int | None = None
    activation_bits: Literal[8] | None = None

    def __post_init__(self) -> None:
        if self.bits not in _MID:
            raise ValueError(f"bits must be 4 or 8, not {self.bits!r}")
        if self.bits == 4 and self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size of 4-bit weights must be one of {GROUP_SIZES}, not {self.group_size!r}")
        if self.activation_bits not in (None, 8) or (self.activation_bits and self.bits != 8):
            raise ValueError("8-bit activations go with 8-bit weights")


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight matrix on its grid.

    Attributes:
        codes: [out, in], uint8 0..15 for 4 bits, int8 for 8 bits.
        scales: [out, groups] in the model's dtype.
        offsets: [out, groups] in the model's dtype, None on a symmetric grid.
    """

    grid: Grid
    codes: Tensor
    scales: Tensor
    offsets: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The weights [out, in] in the model's dtype: computed in float32 and rounded once."""
        grouped = (self.codes.float() - _MID[self.grid.bits]).unflatten(1, (self.scales.shape[1], -1))
        weight = grouped * self.scales.float().unsqueeze(-1)
        if self.offsets is not None:
            weight = weight + self.offsets.float().unsqueeze(-1)
        return weight.flatten(1).to(self.scales.dtype)

    @property
    def symmetric(self) -> bool:
        return self.offsets is None

    def packed_codes(self) -> Tensor:
        """The codes as they are stored."""
        return self.codes[:, ::2] << 4 | self.codes[:, 1::2] if self.grid.bits == 4 else self.codes


def unpack(qweight: Tensor, bits: int) -> Tensor:
    """Codes [out, in] from their stored form."""
    return torch.stack((qweight >> 4, qweight & 15), dim=-1).flatten(1) if bits == 4 else qweight


class PackedLinear(nn.Module):
    """`y = x wᵀ + b` with a packed weight.

    Attributes:
        kernel: What computes the product; see the module's docstring.
        grid: Layout of the weight.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        self.grid = weight.grid
        self.groups = weight.scales.shape[1]
        self.dtype = weight.scales.dtype
        self._kernel = next(kernel for kernel in _KERNELS if kernel.accepts(weight))
        self.kernel = self._kernel.name
        for name, tensor in self._kernel.prepare(weight).items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply inputs [..., in] of the model's dtype; the result is [..., out]."""
        y = self._kernel.multiply(self, x.reshape(-1, self.in_features))
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def dequantize(self) -> Tensor:
        """The weights [out, in] that the layer stands for, read back from what the kernel holds."""
        return self._kernel.restore(self).dequantize()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.grid}, kernel={self.kernel!r}"


class _Kernel(ABC):
    """One way to compute the product: whether it takes a weight, what it keeps of it, and how it multiplies."""

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def accepts(cls, weight: QuantizedWeight) -> bool:
        """Whether the kernel computes this weight."""

    @classmethod
    @abstractmethod
    def prepare(cls, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Buffers to keep, by name."""

    @classmethod
    @abstractmethod
    def multiply(cls, layer: Any, x: Tensor) -> Tensor:
        """x [rows, in] times the weight: [rows, out], without the bias."""

    @classmethod
    @abstractmethod
    def restore(cls, layer: Any) -> QuantizedWeight:
        """The weight on its grid again, from the buffers."""


class _Int4Pack(_Kernel):
    """torch's CPU operator for 4-bit groups; scales and offsets interleaved, [groups, out, 2]."""

    name = "torch int4pack"
    device, multiple_out, multiple_in = "cpu", 16, 2

    @classmethod
    def accepts(cls, weight: QuantizedWeight) -> bool:
        rows, columns = weight.codes.shape
        fits = rows % cls.multiple_out == 0 and columns % cls.multiple_in == 0 and columns % (weight.grid.group_size or 1) == 0
        return weight.grid.bits == 4 and fits and weight.codes.device.type == cls.device and weight.scales.dtype is torch.bfloat16

    @classmethod
    def prepare(cls, weight: QuantizedWeight) -> dict[str, Tensor]:
        offsets = torch.zeros_like(weight.scales) if weight.offsets is None else weight.offsets
        steps = torch.stack((weight.scales, offsets), dim=-1).transpose(0, 1).contiguous()
        return {"weight_packed": cls._pack(weight), "scales_and_offsets": steps}

    @classmethod
    def multiply(cls, layer: Any, x: Tensor) -> Tensor:
        return cls._product(x, layer.weight_packed, layer.grid.group_size, layer.scales_and_offsets)

    @classmethod
    def restore(cls, layer: Any) -> QuantizedWeight:
        """Unit vectors on a grid of scale 1 make the operator itself give the codes; they are small integers, so exactly."""
        scales, offsets = (t.transpose(0, 1).contiguous() for t in layer.scales_and_offsets.unbind(-1))
        unit = torch.zeros_like(layer.scales_and_offsets)
        unit[..., 0] = 1
        eye = torch.eye(layer.in_features, dtype=layer.dtype, device=unit.device)
        codes = cls._product(eye, layer.weight_packed, layer.grid.group_size, unit).t() + _MID[4]
        return QuantizedWeight(layer.grid, codes.to(torch.uint8), scales, offsets if offsets.any() else None)

    @staticmethod
    def _pack(weight: QuantizedWeight) -> Tensor:
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.to(torch.int32), 1)

    @staticmethod
    def _product(x: Tensor, packed: Tensor, group_size: int, steps: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, steps)


class _TinyGemm(_Int4Pack):
    """torch's CUDA operator for 4-bit groups; two 16-wide tiles of inputs side by side."""

    name = "tinygemm"
    device, multiple_out, multiple_in = "cuda", 8, 32

    @classmethod
    def accepts(cls, weight: QuantizedWeight) -> bool:
        return super().accepts(weight) and torch.cuda.get_device_capability(weight.codes.device)[0] >= 8

    @staticmethod
    def _pack(weight: QuantizedWeight) -> Tensor:
        return torch.ops.aten._convert_weight_to_int4pack(weight.packed_codes().contiguous(), 2)

    @staticmethod
    def _product(x: Tensor, packed: Tensor, group_size: int, steps: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, packed, group_size, steps)


class _IntMM(_Kernel):
    """int8 inputs times int8 weights into int32, rescaled by the token's and the row's scale."""

    name = "torch int_mm w8a8"

    @classmethod
    def accepts(cls, weight: QuantizedWeight) -> bool:
        rows, columns = weight.codes.shape
        return weight.grid == Grid(8, None, 8) and weight.symmetric and rows % 8 == 0 and columns % 8 == 0

    @classmethod
    def prepare(cls, weight: QuantizedWeight) -> dict[str, Tensor]:
        return {"codes": weight.codes.contiguous(), "scales": weight.scales.flatten().float()}

    @classmethod
    def multiply(cls, layer: Any, x: Tensor) -> Tensor:
        codes, steps = quantize_tokens(x)
        rows = codes.shape[0]
        if codes.is_cuda and rows < _CUDA_INT_MM_ROWS:
            codes = nn.functional.pad(codes, (0, 0, 0, _CUDA_INT_MM_ROWS - rows))
        products = torch._int_mm(codes, layer.codes.t())[:rows]
        return (products * (steps * layer.scales)).to(x.dtype)

    @classmethod
    def restore(cls, layer: Any) -> QuantizedWeight:
        return QuantizedWeight(layer.grid, layer.codes, layer.scales.to(layer.dtype).unsqueeze(1))


class _Int8Pack(_Kernel):
    """torch's CPU operator for 8-bit weights with one scale a row."""

    name = "torch int8pack"

    @classmethod
    def accepts(cls, weight: QuantizedWeight) -> bool:
        fits = weight.codes.shape[1] % 16 == 0 and weight.codes.device.type == "cpu" and weight.scales.dtype is torch.bfloat16
        return weight.grid == Grid(8) and weight.symmetric and fits

    @classmethod
    def prepare(cls, weight: QuantizedWeight) -> dict[str, Tensor]:
        return {"codes": weight.codes.contiguous(), "scales": weight.scales.flatten()}

    @classmethod
    def multiply(cls, layer: Any, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, layer.codes, layer.scales)

    @classmethod
    def restore(cls, layer: Any) -> QuantizedWeight:
        return QuantizedWeight(layer.grid, layer.codes, layer.scales.unsqueeze(1))


class _Dequantize(_Kernel):
    """Expand the weight, then an ordinary product: no speed to gain, but the memory stays small."""

    name = "dequantize + matmul"

    @classmethod
    def accepts(cls, weight: QuantizedWeight) -> bool:
        return True

    @classmethod
    def prepare(cls, weight: QuantizedWeight) -> dict[str, Tensor]:
        kept = {"qweight": weight.packed_codes().contiguous(), "scales": weight.scales}
        return kept if weight.offsets is None else kept | {"offsets": weight.offsets}

    @classmethod
    def multiply(cls, layer: Any, x: Tensor) -> Tensor:
        if layer.grid.activation_bits:
            codes, steps = quantize_tokens(x)
            x = (codes * steps).to(x.dtype)
        return nn.functional.linear(x, layer.dequantize())

    @classmethod
    def restore(cls, layer: Any) -> QuantizedWeight:
        codes = unpack(layer.qweight, layer.grid.bits)
        return QuantizedWeight(layer.grid, codes, layer.scales, getattr(layer, "offsets", None))


_KERNELS: tuple[type[_Kernel], ...] = (_Int4Pack, _TinyGemm, _IntMM, _Int8Pack, _Dequantize)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of x [rows, in] to int8 by its own largest magnitude.

    Returns:
        Codes, int8 [rows, in], and scales, float32 [rows, 1]; NaN and infinity go into the scale.
    """
    x = x.float()
    steps = (x.abs().amax(1, keepdim=True) if x.numel() else x.new_zeros(x.shape[0], 1)) / _ACTIVATION_MAX
    return (x / steps.clamp_min(torch.finfo(torch.float32).tiny)).round_().to(torch.int8), steps
