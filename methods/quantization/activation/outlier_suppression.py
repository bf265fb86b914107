"""Outlier Suppression+: channels are shifted to be centred and scaled down where they reach beyond a threshold, then W8A8 or W6A6.

For the inputs X [tokens, in] of layers with weights W [out, in], channel j gets

    shift   z_j = (max X_j + min X_j) / 2
    scale   s_j = max(1, max|X_j - z_j| / t)

and the layers see (X - z) / s, multiplied by W · s, with W z in their bias. The threshold t, one for layers with the same inputs, is
the one of a grid with the least squared error of the outputs, ‖Q((X - z) / s) Q(W · s)ᵀ - (X - z) Wᵀ‖². Scales go into the norms and
projections that make X; so do shifts, but not where they would have to go into a norm without a bias: there z / s is subtracted
while the model runs. A product with a gate passes no shift; the inputs of the down projection are only scaled.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.layers import block_linears

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.core.architecture.equivalent import Link
    from slimbench.methods.formats.runtime import ActivationGrid


@dataclass(frozen=True)
class OutlierSuppressionPlus(Method):
    """Symmetric weights by row and inputs by token. With 8 bits products are of integers; with 6 rounding is simulated.

    Attributes:
        bits: Bits of weights and of inputs; 8 are real integers, 6 are simulated.
        thresholds: How many are tried: the largest magnitude times 1/n, 2/n, … 1.
    """

    name = "outlier-suppression-plus"
    citation = Citation("Outlier Suppression+", year=2023, arxiv="2304.09145", covers=("quantization/outlier-suppression-b",))
    needs = Needs(calibration=True)
    produces = "runtime"
    weight_grid = uniform_grid(symmetric=True)

    bits: Literal[6, 8] = 8
    thresholds: int = 20

    def __post_init__(self) -> None:
        if self.thresholds < 1:
            raise ValueError(f"thresholds must be positive, not {self.thresholds}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.formats import packed, runtime
        from slimbench.methods.kernels.rounding import round_layers
        from slimbench.methods.quantization.grids.simulated import round_weights

        model = dense.load()
        layers, grid = block_linears(model), runtime.ActivationGrid("int", self.bits)
        shifts = suppress(model, calibration, grid, self.thresholds, dense)
        details = {"shifts_at_run_time": len(shifts)}
        if self.bits == 8:
            plans = {name: runtime.InputPlan(shift=shift) for name, shift in shifts.items()}
            runtime.save(model, out, plans, round_layers(layers, packed.Grid(8, None, activation_bits=8)))
        else:
            plans = {name: runtime.InputPlan(shift=shifts.get(name), grid=grid) for name in layers}
            round_weights(layers, grid)
            runtime.save(model, out, plans)
        return Claim(self.produces, bits=self.bits, activation_bits=self.bits, simulated=self.bits != 8, details=details)


def suppress(model: Any, calibration: Calibration, grid: ActivationGrid, thresholds: int, dense: DenseModel) -> dict[str, Tensor]:
    """Shift and scale the inputs of all layers of a model in place.

    Returns:
        What must be subtracted from the inputs of a layer while the model runs, float32 [in]; layers that need none are left out.
    """
    import torch

    from slimbench.methods.core.architecture.equivalent import add_bias, links
    from slimbench.methods.core.statistics import inputs, samples
    from slimbench.methods.core.walk import walk
    from slimbench.methods.formats import runtime

    shifts: dict[str, Tensor] = {}
    with ExitStack() as shifted:
        for block in walk(model, calibration.ids, dense.progress):
            found = links(model, block.name, block.module)
            seen, sample = inputs(block, [link.first for link in found]), samples(block, [link.first for link in found])
            for link in found:
                statistics = seen[link.first]
                low, high = link.shared(statistics.low, "amin"), link.shared(statistics.high)
                shift = torch.zeros_like(low) if link.kind == "up" else (low + high) / 2
                largest = torch.maximum(high - shift, shift - low)
                scale = best_scale(link, sample[link.first] - shift, largest, grid, thresholds)
                if link.shifts:
                    link.fold_shift(shift)
                elif link.kind == "norm":
                    for name, layer in link.layers.items():
                        add_bias(layer, layer.weight.detach().float() @ shift)
                        shifts[name] = shift / scale
                        shifted.enter_context(runtime.planned(model, {name: runtime.InputPlan(shift=shifts[name])}))
                link.fold_scale(scale)
    return shifts


def best_scale(link: Link, centred: Tensor, largest: Tensor, grid: ActivationGrid, thresholds: int) -> Tensor:
    """The scale [in] whose threshold gives the least squared error of the outputs.

    Args:
        centred: Inputs [tokens, in] without their shift.
        largest: Largest magnitude of each channel of them, [in].
    """
    import torch

    from slimbench.methods.kernels.numbers import fake_quantize

    weights = link.weights
    wanted = centred @ weights.T
    best, least = torch.ones_like(largest), torch.inf
    for step in range(thresholds, 0, -1):
        scale = threshold_scale(largest, float(largest.max()) * step / thresholds)
        made = fake_quantize(centred / scale, grid) @ fake_quantize(weights * scale, grid).T
        error = float((made - wanted).square().sum())
        if error < least:
            best, least = scale, error
    return best


def threshold_scale(largest: Tensor, threshold: float) -> Tensor:
    """s [in] for a threshold: channels beyond it are scaled down to it."""
    return (largest / max(threshold, 1e-30)).clamp_min(1)
