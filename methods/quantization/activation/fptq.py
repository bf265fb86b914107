"""FPTQ: 4-bit weights and 8-bit inputs, each layer's inputs treated by how far they reach.

With v the largest magnitude among the inputs of a layer on the calibration text:

    v <= low            one scale for all inputs, known beforehand
    low < v < high      logarithmic equalisation of the channels, then one scale known beforehand
    v >= high           one scale a token

Logarithmic activation equalisation divides channel j by s_j = max|X_j| / log2(2 + max|X_j|), so that the largest magnitude left is
log2(2 + max|X_j|); weights are multiplied by s. The division goes into the norm or projection that makes the inputs. Weights are
rounded to nearest in groups, symmetrically.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.layers import block_linears, check_groups
from slimbench.methods.core.settings import Coded, Grouped

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.formats.runtime import InputPlan

_SMALLEST = 1e-5


@dataclass(frozen=True)
class FPTQ(Coded, Grouped, Method):
    """W4A8. Weights are packed; the rounding of inputs is simulated.

    Attributes:
        bits: Bits of a weight, before scales.
        group_size: Inputs that share one scale of the weights; None for one scale a row.
        low: Largest magnitude up to which inputs are left as they are.
        high: Largest magnitude from which on they get a scale for each token.
    """

    name = "fptq"
    citation = Citation("FPTQ", year=2023, arxiv="2308.15987", covers=("quantization/fptq",))
    needs = Needs(calibration=True)
    produces = "runtime"
    weight_grid = uniform_grid(symmetric=True)

    bits: Literal[3, 4, 8] = 4
    low: float = 15.0
    high: float = 150.0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ValueError(f"low must be between 0 and high {self.high}, not {self.low}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.formats import packed, runtime
        from slimbench.methods.kernels.rounding import round_layers

        model = dense.load()
        layers = block_linears(model)
        check_groups(layers, self.group_size)
        plans = self.plans(model, calibration, dense)
        runtime.save(model, out, plans, round_layers(layers, packed.Grid(self.bits, self.group_size)))
        static = sum(plan.static_scale is not None for plan in plans.values())
        details = {"static_layers": static, "token_layers": len(plans) - static}
        return Claim(self.produces, bits=self.bits, group_size=self.group_size, activation_bits=8, simulated=True, details=details)

    def plans(self, model: Any, calibration: Calibration, dense: DenseModel) -> dict[str, InputPlan]:
        """Equalise the channels of a model in place where that is due, and say how the inputs of each layer are rounded."""
        from slimbench.methods.core.architecture.equivalent import links
        from slimbench.methods.core.statistics import inputs
        from slimbench.methods.core.walk import walk
        from slimbench.methods.formats import runtime

        static, token = runtime.ActivationGrid("int", 8, "tensor"), runtime.ActivationGrid("int", 8)
        plans: dict[str, InputPlan] = {}
        for block in walk(model, calibration.ids, dense.progress):
            found = links(model, block.name, block.module)
            seen = inputs(block, [link.first for link in found])
            for link in found:
                largest = link.shared(seen[link.first].largest)
                reach = float(largest.max())
                if reach >= self.high:
                    plans |= dict.fromkeys(link.layers, runtime.InputPlan(grid=token))
                    continue
                if reach > self.low:
                    scale = equalising_scale(largest)
                    link.fold_scale(scale)
                    largest = largest / scale
                plan = runtime.InputPlan(grid=static, static_scale=largest.max().clamp_min(_SMALLEST) / static.largest)
                plans |= dict.fromkeys(link.layers, plan)
        return plans


def equalising_scale(largest: Tensor) -> Tensor:
    """s [in] from the largest magnitude of each channel, [in]."""
    largest = largest.clamp_min(_SMALLEST)
    return largest / (2 + largest).log2()
