"""Atom: the input channels with the largest activations stay in int8, all others go to int4 in small groups (W4A4).

Channels are reordered by the mean square of their activations on the calibration text, the largest ones to the end; the columns of
the weights go with them. The last `outliers` channels of inputs and weights are rounded to 8 bits, those before them to 4 bits with
one scale for each group, of a token and of a row. Weights are rounded by GPTQ. Scales are symmetric and come from the largest
magnitude times a clipping factor. Keys and values keep their dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs, Unsupported
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.layers import block_linears
from slimbench.methods.core.settings import Grouped, SecondOrder


@dataclass(frozen=True)
class Atom(Grouped, SecondOrder, Method):
    """Mixed 4 and 8 bits; weights lie in the model's dtype and products run in it: simulated.

    Attributes:
        outliers: Channels in 8 bits; a multiple of the group size, so that groups cover the others.
        group_size: Channels that share one scale.
        activation_clip: Share of the largest magnitude that the grid of the inputs reaches to, 0..1; those in 8 bits are not clipped.
        weight_clip: The same of the weights.
    """

    name = "atom"
    citation = Citation("Atom", year=2023, arxiv="2310.19102")
    needs = Needs(calibration=True)
    produces = "runtime"
    weight_grid = uniform_grid(symmetric=True, range_="fixed")

    outliers: int = 64
    group_size: Literal[32, 64, 128, 256] = 64
    activation_clip: float = 0.9
    weight_clip: float = 0.85

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outliers < self.group_size or self.outliers % self.group_size:
            raise ValueError(f"outliers must be a positive multiple of group_size {self.group_size}, not {self.outliers}")
        if not (0 < self.activation_clip <= 1 and 0 < self.weight_clip <= 1):
            raise ValueError("activation_clip and weight_clip must be above 0 and at most 1")

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        if self.outliers >= min(shape.hidden_size, shape.intermediate_size):
            raise Unsupported(f"{self.outliers} outlier channels leave none of {min(shape.hidden_size, shape.intermediate_size)} inputs")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core import statistics as _observe
        from slimbench.methods.formats import runtime
        from slimbench.methods.quantization.solvers.blockwise import quantize_blocks
        from slimbench.methods.quantization.solvers.formats import Part, solve

        model = dense.load()
        layers = block_linears(model)
        seen = _observe.of_model(model, calibration.ids)
        orders = {name: statistics.squares.argsort() for name, statistics in seen.items()}
        for name, order in orders.items():
            layers[name].weight.data = layers[name].weight.data[:, order]
        size, high = self.group_size, runtime.ActivationGrid("int", 8)
        weights = runtime.ActivationGrid("int", 4, "group", size, clip=self.weight_clip)
        with runtime.planned(model, {name: runtime.InputPlan(permutation=order) for name, order in orders.items()}):
            for _ in quantize_blocks(
                model,
                calibration.ids,
                lambda _, weight, moments: solve(
                    weight,
                    moments,
                    [Part(weight.shape[1] - self.outliers, weights), Part(self.outliers, high)],
                    self.dampening,
                ),
                dense.progress,
            ):
                pass
        inputs = runtime.ActivationGrid("int", 4, "group", size, clip=self.activation_clip)
        plans = {
            name: runtime.InputPlan(permutation=order, grid=inputs, tail=self.outliers, tail_grid=high) for name, order in orders.items()
        }
        runtime.save(model, out, plans)
        total = sum(layer.weight.numel() for layer in layers.values())
        bits = 4 + 4 * sum(self.outliers * layer.out_features for layer in layers.values()) / total
        details = {"outliers": self.outliers, "outlier_bits": 8, "stored_bits": bits + 16 / size}
        return Claim(self.produces, bits=bits, group_size=size, activation_bits=4, simulated=True, details=details)
