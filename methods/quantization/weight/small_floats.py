"""Weights in floating-point formats of 4 bits that share scales by block: MXFP4 and NVFP4. Rounded to nearest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, ModelShape
from slimbench.methods.quantization.grids.codebook_layers import FORMAT, compress_layers

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.formats.codebook import CodebookWeight

_MX_BLOCK = 32
_NV_BLOCK = 16


@dataclass(frozen=True)
class MXFP4(Method):
    """e2m1 weights in blocks of 32 inputs; the scale of a block is the power of two 2^(floor(log2 max|w|) - 2), in one byte (e8m0).

    Weights above 6 scales are clamped there, as the OCP MX specification has it.
    """

    name = "mxfp4-weight"
    accepts = DENSE
    citation = Citation("Microscaling data formats (OCP MX)", year=2023, arxiv="2310.10537", covers=("quantization/mxfp4-nvfp4-mxfp8",))
    produces = FORMAT
    weight_grid = "float"

    def check(self, shape: ModelShape) -> None:
        shape.check_group(_MX_BLOCK)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.formats.codebook import CodebookWeight
        from slimbench.methods.quantization.grids import levels as _levels

        table = _levels.table(_levels.e2m1(), getattr(torch, dense.dtype))

        def encode(_: str, weight: Tensor) -> CodebookWeight:
            blocks = weight.float().unflatten(1, (-1, _MX_BLOCK))
            scales = _levels.mx_scales(blocks.abs().amax(-1))
            codes = _levels.to_e2m1(blocks / scales.float().unsqueeze(-1)).flatten(1)
            return CodebookWeight.of(codes[None], table, 4, weight.dtype, scales=scales[None])

        return compress_layers(dense, out, encode, bits=4, group_size=_MX_BLOCK)


@dataclass(frozen=True)
class NVFP4(Method):
    """e2m1 weights in blocks of 16 inputs with two levels of scales.

    The tensor's scale is float32, `max|W| / (6 · 448)`, so that the scales of the blocks, `max|w| / 6` divided by it, reach the largest
    number of e4m3, in which they are stored.
    """

    name = "nvfp4-weight"
    accepts = DENSE
    citation = Citation("NVFP4", year=2025, arxiv="2509.25149", covers=("quantization/mxfp4-nvfp4-mxfp8",))
    produces = FORMAT
    weight_grid = "float"

    def check(self, shape: ModelShape) -> None:
        shape.check_group(_NV_BLOCK)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.formats.codebook import CodebookWeight
        from slimbench.methods.quantization.grids import levels as _levels

        table = _levels.table(_levels.e2m1(), getattr(torch, dense.dtype))

        def encode(_: str, weight: Tensor) -> CodebookWeight:
            blocks = weight.float().unflatten(1, (-1, _NV_BLOCK))
            largest = blocks.abs().amax(-1)
            whole = _levels.nonzero(largest.max() / (_levels.E2M1_MAX * _levels.E4M3_MAX))
            scales = (largest / _levels.E2M1_MAX / whole).clamp(max=_levels.E4M3_MAX).to(torch.float8_e4m3fn)
            steps = _levels.nonzero(scales.float() * whole)
            codes = _levels.to_e2m1(blocks / steps.unsqueeze(-1)).flatten(1)
            return CodebookWeight.of(codes[None], table, 4, weight.dtype, scales=scales[None], tensor_scale=whole)

        return compress_layers(dense, out, encode, bits=4, group_size=_NV_BLOCK)
