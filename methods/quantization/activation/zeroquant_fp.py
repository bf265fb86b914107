"""ZeroQuant-FP: weights as 4-bit floating-point numbers (e2m1), inputs as 8-bit ones (e4m3).

Weights are rounded by GPTQ onto e2m1 numbers with one scale for a group of inputs. For casting a weight to e4m3 by a shift of bits,
the paper restricts the scales: `power-of-two` rounds each up to the next power of two, its first way. Inputs are rounded by token.
The low-rank compensation of errors that the paper can add is not part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.layers import block_linears, check_groups
from slimbench.methods.core.settings import Grouped, SecondOrder

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ZeroQuantFP(Grouped, SecondOrder, Method):
    """W4A8 in floating point; weights lie in the model's dtype and products run in it: simulated.

    Attributes:
        group_size: Inputs that share one scale of the weights.
        scales: Of the weights: as they are, or rounded up to powers of two.
    """

    name = "zeroquant-fp"
    citation = Citation("ZeroQuant-FP", year=2023, arxiv="2307.09782", covers=("quantization/zeroquant-fp",))
    needs = Needs(calibration=True)
    produces = "runtime"
    weight_grid = "float"

    group_size: Literal[32, 64, 128, 256] = 64
    scales: Literal["free", "power-of-two"] = "free"

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.formats import runtime
        from slimbench.methods.quantization.solvers.blockwise import quantize_blocks
        from slimbench.methods.quantization.solvers.formats import Part, solve

        model = dense.load()
        layers = block_linears(model)
        check_groups(layers, self.group_size)
        grid = runtime.ActivationGrid("e2m1", 4, "group", self.group_size)
        adjust = up_to_power_of_two if self.scales == "power-of-two" else None
        for _ in quantize_blocks(
            model,
            calibration.ids,
            lambda _, weight, moments: solve(weight, moments, [Part(weight.shape[1], grid, adjust)], self.dampening),
            dense.progress,
        ):
            pass
        runtime.save(model, out, dict.fromkeys(layers, runtime.InputPlan(grid=runtime.ActivationGrid("e4m3"))))
        details = {"number": "e2m1", "activation_number": "e4m3", "scales": self.scales}
        stored = 4 + (8 if self.scales == "power-of-two" else 16) / self.group_size
        return Claim(
            self.produces,
            bits=4,
            group_size=self.group_size,
            activation_bits=8,
            simulated=True,
            details=details | {"stored_bits": stored},
        )


def up_to_power_of_two(scales: Tensor) -> Tensor:
    """Each scale rounded up to a power of two."""
    return scales.log2().ceil().exp2()
