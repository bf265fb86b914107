"""The own CPU kernel as a `Kernel`: who may use it, and the layout of its buffers (see `packed_mm.cpp`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimbench.methods.kernels.base import Kernel
from slimbench.methods.kernels.cpu import build
from slimbench.methods.kernels.grid import PLANES, QuantizedWeight, fields
from slimbench.util.compat.torch import buffers

LANES = 16
_STEP = 32
_DTYPES = (torch.bfloat16, torch.float32)


class OwnCpu(Kernel):
    """Every grid of integers whose groups are multiples of 32 inputs, in bfloat16 and float32."""

    name = "slimbench packed_mm"

    @classmethod
    def accepts(cls, weight: QuantizedWeight) -> bool:
        group = weight.codes.shape[1] // weight.scales.shape[1]
        fits = group % _STEP == 0 and weight.grid.activation_bits is None and weight.grid.number == "int"
        return fits and weight.codes.device.type == "cpu" and weight.scales.dtype in _DTYPES

    @classmethod
    def missing(cls) -> str | None:
        return build.missing()

    @classmethod
    def build(cls) -> str:
        return f"{cls.name} {build.compiled_for()}"

    @classmethod
    def prepare(cls, weight: QuantizedWeight) -> dict[str, Tensor]:
        kept = {"weight_packed": pack(weight.codes, weight.grid.bits, input_groups(weight)), "scales": _by_block(weight.scales)}
        return kept if weight.offsets is None else kept | {"offsets": _by_block(weight.offsets)}

    @classmethod
    def multiply(cls, layer: Any, x: Tensor) -> Tensor:
        kept = buffers(layer)  # a third of the time of a small product is looking up what it needs
        return torch.ops.slimbench.packed_mm(
            x.contiguous(), kept["weight_packed"], kept["scales"], kept.get("offsets"), layer.grid.bits, layer.out_features
        )

    @classmethod
    def restore(cls, layer: Any) -> QuantizedWeight:
        words = layer.weight_packed.permute(0, 3, 1, 2).flatten(0, 1)[: layer.out_features]
        offsets = getattr(layer, "offsets", None)
        scales = _by_row(layer.scales, layer.out_features)
        return QuantizedWeight(
            layer.grid, unpack(words, layer.grid.bits), scales, None if offsets is None else _by_row(offsets, layer.out_features)
        )

    @classmethod
    def rows(cls, layer: Any, index: Tensor) -> Tensor:
        block, lane = index // LANES, index % LANES
        offsets = getattr(layer, "offsets", None)
        return QuantizedWeight(
            layer.grid,
            unpack(layer.weight_packed[block, :, :, lane], layer.grid.bits),
            layer.scales[block, :, lane],
            None if offsets is None else offsets[block, :, lane],
        ).dequantize()


def pack(codes: Tensor, bits: int, groups: int) -> Tensor:
    """Codes [out, in] as int32 words [blocks, groups, words, 16]; rows are filled up with zeros to whole blocks."""
    unsigned = (codes.to(torch.int16) + 128).to(torch.uint8) if bits == 8 else codes
    filled = nn.functional.pad(unsigned, (0, 0, 0, -len(unsigned) % LANES))
    planes = []
    for field, width in fields(filled, bits):
        parts = field.to(torch.int32).view(-1, LANES, groups, field.shape[1] * width // _STEP // groups, 8 // width, 4)
        words = torch.zeros(parts.shape[:4], dtype=torch.int32)
        for s in range(8 // width):
            for t in range(4):
                words |= parts[..., s, t] << width * s + 8 * t
        planes.append(words)
    return torch.cat(planes, dim=3).permute(0, 2, 3, 1).contiguous()


def unpack(words: Tensor, bits: int) -> Tensor:
    """Codes [rows, in] from the words [rows, groups, words] of these rows."""
    codes, begin, shift = None, 0, 0
    for width in PLANES[bits]:
        end = begin + words.shape[2] * width // bits
        shifts = torch.arange(0, 8, width, dtype=torch.int32, device=words.device)
        shifts = (shifts[:, None] + torch.arange(0, 32, 8, dtype=torch.int32, device=words.device)).flatten()
        field = (words[:, :, begin:end].unsqueeze(-1) >> shifts & (1 << width) - 1).flatten(2)
        codes = field << shift if codes is None else codes | field << shift
        begin, shift = end, shift + width
    assert codes is not None
    flat = codes.flatten(1)
    return (flat - 128).to(torch.int8) if bits == 8 else flat.to(torch.uint8)


def input_groups(weight: QuantizedWeight) -> int:
    """Groups in which the kernel takes the inputs: those of the grid; where a row shares its scale, of 64 inputs, or of 32."""
    inputs, groups = weight.codes.shape[1], weight.scales.shape[1]
    return groups if groups > 1 else inputs // (64 if inputs % 64 == 0 else _STEP)


def _by_block(steps: Tensor) -> Tensor:
    """Scales or offsets [out, groups] as [blocks, groups, 16]."""
    filled = nn.functional.pad(steps, (0, 0, 0, -len(steps) % LANES))
    return filled.view(-1, LANES, steps.shape[1]).transpose(1, 2).contiguous()


def _by_row(steps: Tensor, rows: int) -> Tensor:
    return steps.transpose(1, 2).flatten(0, 1)[:rows].contiguous()
