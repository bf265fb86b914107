"""SmoothQuant: scales of input channels move from activations, which have outliers, to weights, which have none; then W8A8.

For the inputs X [tokens, in] of layers with weights W [out, in] and a migration strength α, channel j gets the scale

    s_j = max|X_j|^α / max|W_j|^(1 - α)

X / s is what the layers see, W · s what they multiply with. Division by s costs nothing: it goes into the gain of the norm that
makes X. So smoothed are the inputs of query, key, value, gate and up; output and down projections are quantized as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.layers import block_linears
from slimbench.methods.kernels.rounding import round_layers

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from slimbench.methods.core.statistics import Inputs

_SMALLEST = 1e-5


@dataclass(frozen=True)
class SmoothQuant(Method):
    """Smoothed inputs, then int8 weights by row times int8 inputs by token, as real integers.

    Attributes:
        alpha: Migration strength, 0..1: how much of the difficulty goes from the activations to the weights.
    """

    name = "smoothquant"
    citation = Citation("SmoothQuant", year=2022, arxiv="2211.10438", covers=("quantization/smoothquant",))
    needs = Needs(calibration=True)
    produces = "packed"
    weight_grid = uniform_grid(symmetric=True)

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be between 0 and 1, not {self.alpha}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.formats import packed

        model = dense.load()
        smooth(model, calibration, self.alpha, dense)
        packed.save(model, round_layers(block_linears(model), packed.Grid(8, None, activation_bits=8)), out)
        return Claim(self.produces, bits=8, activation_bits=8, details={"alpha": self.alpha})


@dataclass(frozen=True)
class SmoothQuantStatic(SmoothQuant):
    """Smoothed inputs, then int8 weights by row; one scale for all inputs of a layer, known beforehand.

    The paper's level with static scales has one for a whole weight too; here a row keeps its own. Rounding of inputs is simulated.
    On smollm2-135m the one scale for all inputs of a layer doubles the perplexity (43.5), where scales by token cost 2 %.
    """

    name = "smoothquant-static"
    produces = "runtime"

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.formats import packed, runtime

        model = dense.load()
        largest = smooth(model, calibration, self.alpha, dense)
        grid = runtime.ActivationGrid("int", 8, "tensor")
        plans = {name: runtime.InputPlan(grid=grid, static_scale=top / grid.largest) for name, top in largest.items()}
        runtime.save(model, out, plans, round_layers(block_linears(model), packed.Grid(8)))
        return Claim(self.produces, bits=8, activation_bits=8, simulated=True, details={"alpha": self.alpha, "static": True})


def smooth(model: PreTrainedModel, calibration: Calibration, alpha: float, dense: DenseModel) -> dict[str, Tensor]:
    """Smooth a model in place; it computes the same as before.

    Returns:
        The largest magnitude among the inputs of each linear layer, as they are then, []
    """
    import torch

    from slimbench.methods.core.architecture.equivalent import links
    from slimbench.methods.core.statistics import inputs
    from slimbench.methods.core.walk import walk

    largest: dict[str, Tensor] = {}
    for block in walk(model, calibration.ids, dense.progress):
        seen = inputs(block)
        for link in links(model, block.name, block.module, ("norm",)):
            scale = scales(seen[link.first], link.weights, alpha)
            link.fold_scale(scale)
            for name in link.layers:
                largest[name] = (seen[name].largest / scale).amax()
        largest |= {name: statistics.largest.amax() for name, statistics in seen.items() if name not in largest}
    return {name: torch.where(top == 0, torch.ones_like(top), top) for name, top in largest.items()}


def scales(seen: Inputs, weights: Tensor, alpha: float) -> Tensor:
    """The scale of each input channel, float32 [in], for the weights [out, in] of all layers that read it."""
    of_inputs, of_weights = seen.largest.clamp_min(_SMALLEST), weights.abs().amax(0).clamp_min(_SMALLEST)
    return (of_inputs**alpha / of_weights ** (1 - alpha)).clamp_min(_SMALLEST)
