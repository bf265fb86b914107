"""Block-scaled small floating-point numbers for weights and inputs: MXFP4 and MXFP8 of the OCP standard, and NVFP4.

    MX      32 consecutive inputs share a scale that is a power of two, in 8 bits; numbers are e2m1 (FP4) or e4m3 (FP8)
    NVFP4   16 consecutive inputs share an e4m3 scale; one float32 scale for the whole weight, and one for all inputs of a layer,
            maps the largest of these to 448. Numbers are e2m1

Rounding is to nearest. Weights lie in the model's dtype and products run in it: simulated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs
from slimbench.methods.core.layers import block_linears, check_groups
from slimbench.methods.quantization.grids.simulated import round_weights, tensor_scale

_MX_BLOCK, _NV_BLOCK = 32, 16
_BITS = {"e2m1": 4, "e4m3": 8}


@dataclass(frozen=True)
class Microscaling(Method):
    """MX formats.

    Attributes:
        number: e2m1 for MXFP4, e4m3 for MXFP8.
        activations: Round the inputs of the layers too.
    """

    name = "microscaling"
    citation = Citation("Microscaling (MX) formats", year=2023, arxiv="2310.10537", covers=("quantization/mxfp4-nvfp4-mxfp8",))
    produces = "runtime"
    weight_grid = "float"

    number: Literal["e2m1", "e4m3"] = "e2m1"
    activations: bool = True

    def check(self, shape: ModelShape) -> None:
        shape.check_group(_MX_BLOCK)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.formats import runtime

        model = dense.load()
        layers, bits = block_linears(model), _BITS[self.number]
        check_groups(layers, _MX_BLOCK)
        grid = runtime.ActivationGrid(self.number, bits, "group", _MX_BLOCK, scale_format="e8m0")
        round_weights(layers, grid)
        runtime.save(model, out, dict.fromkeys(layers, runtime.InputPlan(grid=grid)) if self.activations else {})
        return _claim(bits, _MX_BLOCK, self.activations, {"number": self.number})


@dataclass(frozen=True)
class NVFP4(Method):
    """NVFP4; the scale for all inputs of a layer comes from calibration.

    Attributes:
        activations: Round the inputs of the layers too.
    """

    name = "nvfp4"
    citation = Citation("NVFP4", year=2025, covers=("quantization/mxfp4-nvfp4-mxfp8",))
    needs = Needs(calibration=True)
    produces = "runtime"
    weight_grid = "float"

    activations: bool = True

    def check(self, shape: ModelShape) -> None:
        shape.check_group(_NV_BLOCK)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core import statistics as _observe
        from slimbench.methods.formats import runtime

        model = dense.load()
        layers = block_linears(model)
        check_groups(layers, _NV_BLOCK)
        grid, plans = runtime.ActivationGrid("e2m1", 4, "group", _NV_BLOCK, scale_format="e4m3"), {}
        if self.activations:
            seen = _observe.of_model(model, calibration.ids, dense.progress)
            plans = {
                name: runtime.InputPlan(grid=grid, static_scale=tensor_scale(inputs.largest.amax(), grid)) for name, inputs in seen.items()
            }
        round_weights(layers, grid)
        runtime.save(model, out, plans)
        return _claim(4, _NV_BLOCK, self.activations, {"number": "e2m1", "scales": "e4m3"})


def _claim(bits: int, block: int, activations: bool, details: dict[str, object]) -> Claim:
    return Claim(
        "runtime",
        bits=bits,
        group_size=block,
        activation_bits=bits if activations else None,
        simulated=True,
        details=details | {"stored_bits": bits + 8 / block},
    )
