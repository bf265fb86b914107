"""MoFQ: for each layer the integer or the floating-point format of four bits, whichever rounds its weights with the smaller error.

Both have 16 codes and a scale for each group: int4 with `max|w| / 7` and levels -7 .. 7, e2m1 with `max|w| / 6`; no code is spent on
infinity or NaN. The error is the mean squared one of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method
from slimbench.methods.core.settings import Grouped
from slimbench.methods.quantization.grids.codebook_layers import FORMAT, compress_layers

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.formats.codebook import CodebookWeight

_INT4_MAX = 7.0


@dataclass(frozen=True)
class MoFQ(Grouped, Method):
    """INT4 or FP4 by layer, weight only, no data."""

    name = "mofq"
    accepts = DENSE
    citation = Citation("MoFQ", year=2023, arxiv="2305.12356")
    produces = FORMAT
    weight_grid = "integer or float"

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.quantization.grids import levels as _levels

        dtype = getattr(torch, dense.dtype)
        formats: dict[str, tuple[Any, float, Tensor]] = {
            "int4": (_levels.to_int4, _INT4_MAX, _levels.table(_levels.int4(), dtype).to(dense.device)),
            "fp4": (_levels.to_e2m1, _levels.E2M1_MAX, _levels.table(_levels.e2m1(), dtype).to(dense.device)),
        }
        chosen = dict.fromkeys(formats, 0)

        def encode(_: str, weight: Tensor) -> CodebookWeight:
            tried = {name: self.round(weight, *format_) for name, format_ in formats.items()}
            errors = {name: float((made.dequantize().float() - weight.float()).square().mean()) for name, made in tried.items()}
            best = min(errors, key=lambda name: errors[name])
            chosen[best] += 1
            return tried[best]

        return compress_layers(dense, out, encode, bits=4, group_size=self.group_size, details={"layers": chosen})

    def round(self, weight: Tensor, to_codes: Any, largest: float, table: Tensor) -> CodebookWeight:
        """Round a weight [out, in] to a format with this largest level."""
        from slimbench.methods.formats.codebook import CodebookWeight
        from slimbench.methods.quantization.grids import levels as _levels

        groups = weight.float().unflatten(1, (-1, self.group_size or weight.shape[1]))
        scales = _levels.nonzero((groups.abs().amax(-1) / largest).to(weight.dtype))
        codes = to_codes((groups / scales.float().unsqueeze(-1)).clamp(-largest, largest)).flatten(1)
        return CodebookWeight.of(codes[None], table, 4, weight.dtype, scales=scales[None])
