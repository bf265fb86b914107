"""OliVe: four-bit integers in which an outlier takes over the code of its neighbour, the victim, which becomes zero.

Pairs of neighbouring values are rounded as `methods.kernels.numbers` says: to -7 .. 7 times a scale, or, where one is beyond that, to an
outlier of up to 96 times the scale and a zero. One scale for a whole weight, and one, from calibration, for all inputs of a layer;
each is the one of a range of multiples of the standard deviation that has the least squared error.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs
from slimbench.methods.core.layers import block_linears, check_groups

if TYPE_CHECKING:
    from torch import Tensor

_ENDS = tuple(0.5 + 0.25 * step for step in range(39))
"""Candidates for the value that stands at 7, in standard deviations: from 0.5 to 10."""


@dataclass(frozen=True)
class OliVe(Method):
    """Weights, and inputs if wanted; numbers lie in the model's dtype and products run in it: simulated.

    Attributes:
        activations: Round the inputs of the layers too.
    """

    name = "olive"
    citation = Citation("OliVe", year=2023, arxiv="2304.07493", covers=("quantization/olive-oilve-in-text",))
    needs = Needs(calibration=True)
    produces = "runtime"
    weight_grid = "outlier-victim pairs"

    activations: bool = True

    def check(self, shape: ModelShape) -> None:
        shape.check_group(2)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.core.statistics import samples
        from slimbench.methods.core.walk import walk
        from slimbench.methods.formats import runtime

        model = dense.load()
        layers = block_linears(model)
        check_groups(layers, 2)
        grid, plans = runtime.ActivationGrid("ovp", 4, "tensor"), dict[str, runtime.InputPlan]()
        if self.activations:
            for block in walk(model, calibration.ids, dense.progress):
                seen = samples(block, list(block.linears()))
                plans |= {name: runtime.InputPlan(grid=grid, static_scale=best_scale(x)) for name, x in seen.items()}
        with torch.no_grad():
            for layer in layers.values():
                layer.weight.copy_(runtime.fake_quantize(layer.weight, grid, best_scale(layer.weight.float())))
        runtime.save(model, out, plans)
        return Claim(self.produces, bits=4, activation_bits=4 if self.activations else None, simulated=True)


def best_scale(values: Tensor) -> Tensor:
    """The scale, float32 [], of values [..., n], n even, with the least squared error."""
    import torch

    from slimbench.methods.kernels.numbers import outlier_victim

    values, deviation = values.detach(), values.detach().std().clamp_min(1e-12)
    best, least = deviation, torch.inf
    for end in _ENDS:
        scale = end * deviation / 7
        error = float((outlier_victim(values / scale) * scale - values).square().sum())
        if error < least:
            best, least = scale, error
    return best
