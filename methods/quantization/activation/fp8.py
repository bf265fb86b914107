"""FP8: numbers of type e4m3 (4 bits of exponent, 3 of mantissa, largest 448) with scales that map the largest magnitude to 448.

Weight-only: one scale for each row, in the model's dtype. Dynamic: the inputs too, one float32 scale for each token. Static: one float32
scale for a weight and one, from calibration, for all inputs of a layer; no kernel has these, so products are simulated in the model's
dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.layers import block_linears
from slimbench.methods.quantization.grids.simulated import round_weights

if TYPE_CHECKING:
    from torch import nn

    from slimbench.methods.kernels.grid import Grid, QuantizedWeight


@dataclass(frozen=True)
class FP8Weight(Method):
    """Weights by row; inputs keep their dtype. It has no settings."""

    name = "fp8-weight"
    accepts = DENSE
    citation = Citation("FP8 (e4m3)", year=2022, arxiv="2209.05433")
    reference = "torch:float8_e4m3fn"
    produces = "packed"
    weight_grid = "float"

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        return self._save(dense, None, out)

    def _save(self, dense: DenseModel, activation_bits: Literal[8] | None, out: Path) -> Claim:
        from slimbench.methods.formats import packed

        model = dense.load()
        packed.save(model, _round_rows(block_linears(model), packed.Grid(8, None, activation_bits, "e4m3")), out)
        return Claim(self.produces, bits=8, activation_bits=activation_bits, details={"number": "e4m3"})


@dataclass(frozen=True)
class FP8Dynamic(FP8Weight):
    """Weights by row, inputs by token. It has no settings."""

    name = "fp8-dynamic"
    accepts = DENSE
    reference = "torch:_scaled_mm"

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        return self._save(dense, 8, out)


@dataclass(frozen=True)
class FP8Static(Method):
    """One scale for a weight, one for the inputs of a layer. It has no settings."""

    name = "fp8-static"
    citation = Citation("FP8 (e4m3)", year=2022, arxiv="2209.05433")
    produces = "runtime"
    needs = Needs(calibration=True)
    weight_grid = "float"

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core import statistics as _observe
        from slimbench.methods.formats import runtime

        model = dense.load()
        grid = runtime.ActivationGrid("e4m3", granularity="tensor")
        seen = _observe.of_model(model, calibration.ids, dense.progress)
        plans = {
            name: runtime.InputPlan(grid=grid, static_scale=statistics.largest.amax() / grid.largest) for name, statistics in seen.items()
        }
        round_weights(block_linears(model), grid)
        runtime.save(model, out, plans)
        return Claim(self.produces, bits=8, activation_bits=8, simulated=True, details={"number": "e4m3", "static": True})


def _round_rows(layers: dict[str, nn.Linear], grid: Grid) -> Iterator[tuple[str, QuantizedWeight]]:
    import torch

    from slimbench.methods.kernels.grid import QuantizedWeight
    from slimbench.methods.quantization.grids.levels import E4M3_MAX, nonzero

    for name, layer in layers.items():
        weight = layer.weight.detach()
        scales = nonzero((weight.float().abs().amax(1, keepdim=True) / E4M3_MAX).to(weight.dtype))
        codes = (weight.float() / scales.float()).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        yield name, QuantizedWeight(grid, codes, scales)
