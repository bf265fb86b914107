"""Products by the operators that torch has, and the one that always works: expand the weight, then multiply.

    torch int4pack          4 bits, CPU, bfloat16, out a multiple of 16
    tinygemm                4 bits, CUDA from compute capability 8, bfloat16, out a multiple of 8, in a multiple of 32
    torch int8pack          8 bits, one scale a row, CPU, bfloat16, in a multiple of 16
    torch int_mm w8a8       8 bits and 8-bit inputs, one scale a row, in and out multiples of 8
    torch scaled_mm e4m3    e4m3 weights and inputs, CUDA from compute capability 8.9, bfloat16, in and out multiples of 16
    dequantize + matmul     everything else: the weight is expanded on every call

torch's packed CPU operators accept float16 and float32 too, but run scalar loops that are many times slower than a dense
product. Its 8-bit operator reads beyond rows whose length is no multiple of 16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimbench.methods.kernels.base import Kernel
from slimbench.methods.kernels.grid import Grid, QuantizedWeight, unpack
from slimbench.methods.kernels.numbers import FLOATS
from slimbench.util.compat import torch as compat

_LARGEST = {"int": 127.0, "e4m3": FLOATS["e4m3"].largest}
_OLDEST_FLOAT8 = (8, 9)
_CUDA_INT_MM_ROWS = 17


class Int4Pack(Kernel):
    """torch's CPU operator for 4-bit groups; scales and offsets interleaved, [groups, out, 2].

    Its packed rows lie in blocks of up to `block`, each of which is a packed weight of its own.
    """

    name = "torch int4pack"
    device, multiple_out, multiple_in, block = "cpu", 16, 2, 64

    @classmethod
    def accepts(cls, weight: QuantizedWeight) -> bool:
        rows, columns = weight.codes.shape
        groups = weight.grid.group_size is not None and columns % weight.grid.group_size == 0
        fits = groups and rows % cls.multiple_out == 0 and columns % cls.multiple_in == 0
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
        weight = cls._unpack(layer, layer.weight_packed, layer.scales_and_offsets)
        assert weight.offsets is not None
        return weight if weight.offsets.any() else QuantizedWeight(weight.grid, weight.codes, weight.scales)

    @classmethod
    def rows(cls, layer: Any, index: Tensor) -> Tensor:
        """Some rows of the weight, dequantized: [n, in] for an index [n]. The blocks in which they lie are unpacked one for each."""
        if layer.out_features % cls.block or len(index) * cls.block >= layer.out_features:
            return super().rows(layer, index)
        blocks, within = index // cls.block, torch.arange(cls.block, device=index.device)
        packed = layer.weight_packed.unflatten(0, (layer.out_features // cls.block, -1))[blocks].flatten(0, 1)
        steps = layer.scales_and_offsets[:, (blocks[:, None] * cls.block + within).flatten()]
        wanted = torch.arange(len(index), device=index.device) * cls.block + index % cls.block
        return cls._unpack(layer, packed, steps).take(wanted).dequantize()

    @classmethod
    def _unpack(cls, layer: Any, packed: Tensor, steps: Tensor) -> QuantizedWeight:
        """Unit vectors on a grid of scale 1 make the operator itself give the codes; they are small integers, so exactly."""
        unit = torch.stack((torch.ones_like(steps[..., 0]), torch.zeros_like(steps[..., 0])), dim=-1)
        eye = torch.eye(layer.in_features, dtype=layer.dtype, device=unit.device)
        codes = cls._product(eye, packed, layer.grid.group_size, unit).t() + layer.grid.mid
        scales, offsets = (t.transpose(0, 1).contiguous() for t in steps.unbind(-1))
        return QuantizedWeight(layer.grid, codes.to(torch.uint8), scales, offsets)

    @staticmethod
    def _pack(weight: QuantizedWeight) -> Tensor:
        return compat.pack_int4_cpu(weight.codes.to(torch.int32), 1)

    @staticmethod
    def _product(x: Tensor, packed: Tensor, group_size: int, steps: Tensor) -> Tensor:
        return compat.weight_int4pack_mm_cpu(x, packed, group_size, steps)


class TinyGemm(Int4Pack):
    """torch's CUDA operator for 4-bit groups; two 16-wide tiles of inputs side by side."""

    name = "tinygemm"
    device, multiple_out, multiple_in, block = "cuda", 8, 32, 8

    @classmethod
    def accepts(cls, weight: QuantizedWeight) -> bool:
        return super().accepts(weight) and torch.cuda.get_device_capability(weight.codes.device)[0] >= 8

    @staticmethod
    def _pack(weight: QuantizedWeight) -> Tensor:
        return compat.pack_int4(weight.packed_codes().contiguous(), 2)

    @staticmethod
    def _product(x: Tensor, packed: Tensor, group_size: int, steps: Tensor) -> Tensor:
        return compat.weight_int4pack_mm(x, packed, group_size, steps)


class IntMM(Kernel):
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
        codes, steps = quantize_tokens(x, layer.grid)
        rows = codes.shape[0]
        if codes.is_cuda and rows < _CUDA_INT_MM_ROWS:
            codes = nn.functional.pad(codes, (0, 0, 0, _CUDA_INT_MM_ROWS - rows))
        products = compat.int_mm(codes, layer.codes.t())[:rows]
        return (products * (steps * layer.scales)).to(x.dtype)

    @classmethod
    def restore(cls, layer: Any) -> QuantizedWeight:
        return QuantizedWeight(layer.grid, layer.codes, layer.scales.to(layer.dtype).unsqueeze(1))


class Float8(Kernel):
    """e4m3 inputs times e4m3 weights into float32, rescaled by the token's and the row's scale."""

    name = "torch scaled_mm e4m3"
    device = "cuda"

    @classmethod
    def accepts(cls, weight: QuantizedWeight) -> bool:
        rows, columns = weight.codes.shape
        fits = rows % 16 == 0 and columns % 16 == 0 and weight.scales.dtype is torch.bfloat16
        return weight.grid == Grid(8, None, 8, "e4m3") and weight.symmetric and fits and weight.codes.device.type == cls.device

    @classmethod
    def missing(cls) -> str | None:
        found = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
        return None if found >= _OLDEST_FLOAT8 else f"needs compute capability 8.9, this card has {found[0]}.{found[1]}"

    @classmethod
    def prepare(cls, weight: QuantizedWeight) -> dict[str, Tensor]:
        return {"codes": weight.codes.contiguous(), "scales": weight.scales.flatten().float()}

    @classmethod
    def multiply(cls, layer: Any, x: Tensor) -> Tensor:
        if not x.shape[0]:
            return x.new_empty(0, layer.out_features)
        codes, steps = quantize_tokens(x, layer.grid)
        return compat.scaled_mm(codes, layer.codes.t(), scale_a=steps, scale_b=layer.scales.unsqueeze(0), out_dtype=x.dtype)

    @classmethod
    def restore(cls, layer: Any) -> QuantizedWeight:
        return QuantizedWeight(layer.grid, layer.codes, layer.scales.to(layer.dtype).unsqueeze(1))


class Int8Pack(Kernel):
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
        return compat.weight_int8pack_mm(x, layer.codes, layer.scales)

    @classmethod
    def restore(cls, layer: Any) -> QuantizedWeight:
        return QuantizedWeight(layer.grid, layer.codes, layer.scales.unsqueeze(1))


class Dequantize(Kernel):
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
            codes, steps = quantize_tokens(x, layer.grid)
            x = (codes.float() * steps).to(x.dtype)
        return nn.functional.linear(x, cls.restore(layer).dequantize())

    @classmethod
    def restore(cls, layer: Any) -> QuantizedWeight:
        codes = unpack(layer.qweight, layer.grid.bits)
        return QuantizedWeight(layer.grid, codes, layer.scales, getattr(layer, "offsets", None))

    @classmethod
    def rows(cls, layer: Any, index: Tensor) -> Tensor:
        """Some rows of the weight, dequantized: [n, in] for an index [n]; no others are unpacked."""
        offsets = getattr(layer, "offsets", None)
        codes = unpack(layer.qweight[index], layer.grid.bits)
        return QuantizedWeight(layer.grid, codes, layer.scales[index], None if offsets is None else offsets[index]).dequantize()


def quantize_tokens(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Round each row of x [rows, in] to the numbers of a grid by its own largest magnitude.

    Returns:
        Codes [rows, in], int8 or float8_e4m3fn, and scales, float32 [rows, 1]; NaN and infinity go into the scale.
    """
    x = x.float()
    steps = (x.abs().amax(1, keepdim=True) if x.numel() else x.new_zeros(x.shape[0], 1)) / _LARGEST[grid.number]
    values = x / steps.clamp_min(torch.finfo(torch.float32).tiny)
    return (values.round_().to(torch.int8) if grid.number == "int" else values.to(torch.float8_e4m3fn)), steps
