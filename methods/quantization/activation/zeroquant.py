"""ZeroQuant: weights in groups, inputs by token; all in int8, or the MLP's weights in int4.

A weight [out, in] is cut into groups of consecutive rows, each with one symmetric scale, which the rows of a packed weight then
share. Every token's inputs get a symmetric scale of their own while the model runs. The paper's layer-by-layer distillation, which
it adds where MLPs are in int4, is not part of it here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method, ModelShape, Unsupported
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.layers import block_linears
from slimbench.methods.kernels.rounding import round_to_grid

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slimbench.methods.kernels.grid import Grid, QuantizedWeight


@dataclass(frozen=True)
class ZeroQuant(Method):
    """Int8 weights by groups of rows and int8 inputs by token, multiplied as integers.

    Attributes:
        groups: Groups of consecutive rows of a weight, each with one scale; must divide the outputs of every layer.
    """

    name = "zeroquant"
    citation = Citation("ZeroQuant", year=2022, arxiv="2206.01861", covers=("quantization/zeroquant",))
    produces = "packed"
    weight_grid = uniform_grid(symmetric=True)

    groups: int = 64

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"groups must be positive, not {self.groups}")

    def check(self, shape: ModelShape) -> None:
        for outputs in (shape.hidden_size, shape.intermediate_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim):
            if outputs % self.groups:
                raise Unsupported(f"{self.groups} groups do not divide the {outputs} outputs of a layer")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.formats import packed

        model = dense.load()
        layers = self._layers(block_linears(model))
        packed.save(model, round_row_groups(layers, dict.fromkeys(layers, packed.Grid(8, None, activation_bits=8)), self.groups), out)
        return Claim(self.produces, bits=8, activation_bits=8, details={"groups": self.groups})

    def _layers(self, layers: dict[str, nn.Linear]) -> dict[str, nn.Linear]:
        for name, layer in layers.items():
            if layer.out_features % self.groups:
                raise Unsupported(f"{self.groups} groups do not divide the {layer.out_features} outputs of {name}")
        return layers


@dataclass(frozen=True)
class ZeroQuantMixed(ZeroQuant):
    """Int4 weights in the MLPs and int8 ones in attention (W4/8A8); the rounding of inputs is simulated.

    Attributes:
        groups: Groups of consecutive rows of a weight, each with one scale; must divide the outputs of every layer.
    """

    name = "zeroquant-mixed"
    produces = "runtime"

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.formats import packed, runtime

        model = dense.load()
        layers = self._layers(block_linears(model))
        grids = {name: packed.Grid(4 if ".mlp." in name else 8) for name in layers}
        weights = sum(layer.weight.numel() for layer in layers.values())
        bits = sum(grids[name].bits * layer.weight.numel() for name, layer in layers.items()) / weights
        if bits == 8:
            raise Unsupported(f"{type(model).__name__} has no linear layers in a module called mlp")
        plan = runtime.InputPlan(grid=runtime.ActivationGrid("int", 8))
        runtime.save(model, out, dict.fromkeys(layers, plan), round_row_groups(layers, grids, self.groups))
        details = {"groups": self.groups, "mlp_bits": 4, "attention_bits": 8}
        return Claim(self.produces, bits=bits, activation_bits=8, simulated=True, details=details)


def round_row_groups(layers: dict[str, nn.Linear], grids: dict[str, Grid], groups: int) -> Iterator[tuple[str, QuantizedWeight]]:
    """Weights to nearest, symmetric, with one scale for each of some groups of consecutive rows; one layer at a time."""
    for name, layer in layers.items():
        yield name, _by_row_groups(layer.weight.detach(), grids[name], groups)


def _by_row_groups(weight: Tensor, grid: Grid, groups: int) -> QuantizedWeight:
    from slimbench.methods.kernels.grid import QuantizedWeight

    coarse = round_to_grid(weight.reshape(groups, -1), grid)
    scales = coarse.scales.repeat_interleave(weight.shape[0] // groups, dim=0)
    return QuantizedWeight(grid, coarse.codes.view_as(weight), scales)
