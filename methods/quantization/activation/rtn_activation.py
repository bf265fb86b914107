"""RTN of weights and activations: both go to the nearest point of a uniform grid. The baseline of methods that do more."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method, ModelShape
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.layers import block_linears, check_groups
from slimbench.methods.core.settings import Coded, Grouped
from slimbench.methods.kernels.rounding import round_layers


@dataclass(frozen=True)
class RTNActivation(Coded, Grouped, Method):
    """Weights are packed; inputs are rounded by token, or by groups of a token, to numbers in the model's dtype (simulated).

    Attributes:
        bits: Bits of a weight, before scales.
        group_size: Inputs that share one scale of the weights; None for one scale a row.
        symmetric: Centre the grid of the weights on zero.
        activation_bits: Bits of an input.
        activation_group_size: Inputs of a token that share one scale; None for one scale a token.
        activation_symmetric: Centre the grid of the inputs on zero; else from the smallest to the largest.
    """

    name = "rtn-activation"
    citation = Citation("Round-to-nearest of weights and activations", year=2022, arxiv="2206.01861")
    produces = "runtime"

    bits: Literal[2, 3, 4, 8] = 4
    symmetric: bool = True
    activation_bits: Literal[4, 6, 8] = 8
    activation_group_size: Literal[32, 64, 128, 256] | None = None
    activation_symmetric: bool = True

    @property
    def weight_grid(self) -> str:
        return uniform_grid(self.symmetric)

    def check(self, shape: ModelShape) -> None:
        for group_size in (self.group_size, self.activation_group_size):
            if group_size:
                shape.check_group(group_size)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.formats import packed, runtime

        model = dense.load()
        layers = block_linears(model)
        check_groups(layers, self.group_size)
        check_groups(layers, self.activation_group_size)
        group = self.activation_group_size
        grid = runtime.ActivationGrid(
            "int", self.activation_bits, "group" if group else "token", group, symmetric=self.activation_symmetric
        )
        weights = round_layers(layers, packed.Grid(self.bits, self.group_size), self.symmetric)
        runtime.save(model, out, dict.fromkeys(layers, runtime.InputPlan(grid=grid)), weights)
        details = {"symmetric": self.symmetric, "activation_group_size": group, "activation_symmetric": self.activation_symmetric}
        return Claim(
            self.produces,
            bits=self.bits,
            group_size=self.group_size,
            activation_bits=self.activation_bits,
            simulated=True,
            details=details,
        )
