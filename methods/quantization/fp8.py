"""FP8: weights and inputs as e4m3 numbers (4 bits of exponent, 3 of mantissa, largest 448), each with a float32 scale.

The scale maps the largest magnitude to 448. Dynamic: one for each row of a weight and one for each token. Static: one for a weight
and one for all inputs of a layer, from calibration. Products are simulated in the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from methods._common import block_linears
from methods.base import Calibration, Citation, Claim, DenseModel, Method, Needs
from methods.quantization._simulated import round_weights


@dataclass(frozen=True)
class FP8Dynamic(Method):
    """Weights by row, inputs by token. It has no settings."""

    family: ClassVar[str] = "quantization"
    citation: ClassVar[Citation] = Citation("FP8 (e4m3)", year=2022, arxiv="2209.05433")
    reference: ClassVar[str] = "paper"
    produces: ClassVar[str] = "runtime"

    def compress(self, dense: DenseModel, calibration: Calibration | None, out: Path) -> Claim:
        from methods.kernels import runtime

        model = dense.load()
        layers, grid = block_linears(model), runtime.ActivationGrid("e4m3")
        round_weights(layers, grid)
        runtime.save(model, out, dict.fromkeys(layers, runtime.InputPlan(grid=grid)))
        return Claim(self.produces, bits=8, activation_bits=8, simulated=True, details={"number": "e4m3"})


@dataclass(frozen=True)
class FP8Static(FP8Dynamic):
    """One scale for a weight, one for the inputs of a layer. It has no settings."""

    needs: ClassVar[Needs] = Needs(calibration=True)

    def compress(self, dense: DenseModel, calibration: Calibration | None, out: Path) -> Claim:
        from methods.kernels import runtime
        from methods.quantization import _observe

        assert calibration is not None
        model = dense.load()
        grid = runtime.ActivationGrid("e4m3", granularity="tensor")
        seen = _observe.of_model(model, calibration.ids, dense.progress)
        plans = {
            name: runtime.InputPlan(grid=grid, static_scale=statistics.largest.amax() / grid.largest) for name, statistics in seen.items()
        }
        round_weights(block_linears(model), grid)
        runtime.save(model, out, plans)
        return Claim(self.produces, bits=8, activation_bits=8, simulated=True, details={"number": "e4m3", "static": True})
