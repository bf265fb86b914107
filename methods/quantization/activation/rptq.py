"""RPTQ: input channels with similar ranges are clustered, moved next to each other, and share a static asymmetric grid.

Channels of a layer's inputs are clustered by their smallest and largest value on the calibration text (k-means in two dimensions).
They are reordered so that clusters stand together, and the columns of the weights with them. Each cluster gets one scale and offset,
known beforehand, from its smallest and largest value. Weights are rounded by GPTQ, one asymmetric grid a row. Keys, values and
queries keep their dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.layers import block_linears, check_groups
from slimbench.methods.core.settings import Coded, Grouped, SecondOrder

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.core.statistics import Inputs
    from slimbench.methods.formats.runtime import ActivationGrid, InputPlan


@dataclass(frozen=True)
class RPTQ(Coded, Grouped, SecondOrder, Method):
    """Weights are packed; the rounding of inputs is simulated.

    Attributes:
        bits: Bits of a weight, before scales.
        group_size: Inputs that share one scale of the weights; None for one scale a row, as in the paper.
        activation_bits: Bits of an input.
        clusters: Of the channels of a layer's inputs.
    """

    name = "rptq"
    citation = Citation("RPTQ", year=2023, arxiv="2304.01089", covers=("quantization/rptq",))
    needs = Needs(calibration=True)
    produces = "runtime"
    draws = True
    weight_grid = uniform_grid(symmetric=False, range_="searched")

    bits: Literal[2, 3, 4, 8] = 4
    group_size: Literal[32, 64, 128, 256] | None = None
    activation_bits: Literal[3, 4, 6, 8] = 8
    clusters: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters < 1:
            raise ValueError(f"clusters must be positive, not {self.clusters}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core import statistics as _observe
        from slimbench.methods.core.second_order import Solver, quantize
        from slimbench.methods.formats import packed, runtime
        from slimbench.methods.quantization.solvers.blockwise import quantize_blocks

        model = dense.load()
        layers = block_linears(model)
        check_groups(layers, self.group_size)
        grid = runtime.ActivationGrid("int", self.activation_bits, "tensor", symmetric=False)
        plans = {name: clustered(seen, self.clusters, grid, dense.seed) for name, seen in _observe.of_model(model, calibration.ids).items()}
        for name, plan in plans.items():
            layers[name].weight.data = layers[name].weight.data[:, plan.permutation]
        orders = {name: runtime.InputPlan(permutation=plan.permutation) for name, plan in plans.items()}
        weights, solver = packed.Grid(self.bits, self.group_size), Solver(False, self.dampening)
        with runtime.planned(model, orders):
            quantized = quantize_blocks(
                model,
                calibration.ids,
                lambda _, weight, moments: quantize(weight, moments, weights, solver, symmetric=False),
                dense.progress,
            )
            runtime.save(model, out, plans, quantized)
        return Claim(
            self.produces,
            bits=self.bits,
            group_size=self.group_size,
            activation_bits=self.activation_bits,
            simulated=True,
            details={"clusters": self.clusters},
        )


def clustered(seen: Inputs, clusters: int, grid: ActivationGrid, seed: int) -> InputPlan:
    """The order of the channels, and the scale and offset of each in that order."""
    import torch

    from slimbench.methods.formats.runtime import InputPlan
    from slimbench.methods.kernels.numbers import range_scales

    labels = labels_of(seen.low, seen.high, clusters, seed)
    order = labels.argsort(stable=True)
    low, high = torch.empty_like(seen.low), torch.empty_like(seen.high)
    for label in labels.unique():
        members = labels == label
        low[members], high[members] = seen.low[members].min(), seen.high[members].max()
    scale, offset = range_scales(low[order], high[order], grid)
    return InputPlan(permutation=order, grid=grid, static_scale=scale, static_offset=offset)


def labels_of(low: Tensor, high: Tensor, clusters: int, seed: int) -> Tensor:
    """The cluster of each channel, int64 [in]; k-means over (smallest, largest) with at most as many clusters as channels."""
    import warnings

    import torch
    from scipy.cluster.vq import kmeans2

    points = torch.stack((low, high), 1).double().cpu().numpy()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*clusters is empty.*")
        _, labels = kmeans2(points, min(clusters, len(points)), minit="++", seed=seed)
    return torch.from_numpy(labels).long().to(low.device)
