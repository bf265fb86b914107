"""Dynamic INT8: int8 weights times inputs that are rounded to int8 on the fly, one scale a token (W8A8).

The simplest of the recipes in which the matrix product itself runs on integers; ZeroQuant's token-wise activations with one scale
a row of the weight, and without its distillation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.layers import block_linears
from slimbench.methods.kernels.rounding import round_layers


@dataclass(frozen=True)
class Int8Dynamic(Method):
    """Symmetric int8 weights by row and symmetric int8 inputs by token. It has no settings."""

    name = "int8-dynamic"
    accepts = DENSE
    citation = Citation("Dynamic INT8 (token-wise W8A8)", year=2022, arxiv="2206.01861")
    reference = "torch:_int_mm"
    produces = "packed"
    weight_grid = uniform_grid(symmetric=True)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.formats import packed

        model = dense.load()
        packed.save(model, round_layers(block_linears(model), packed.Grid(8, None, activation_bits=8)), out)
        return Claim(self.produces, bits=8, activation_bits=8)
