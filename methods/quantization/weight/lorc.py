"""ZeroQuant-V2's low-rank compensation: what rounding takes away is given back, in part, by a product of two thin matrices.

With the error E = W - Ŵ of rounding to nearest and its singular values E = U Σ Vᵀ, the weight becomes Ŵ + (U_r Σ_r^½)(Σ_r^½ V_rᵀ) for the
r largest of them. No product of that rank is closer to E in the Frobenius norm. The two factors keep the model's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, ModelShape, Unsupported
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.layers import block_linears, check_groups
from slimbench.methods.core.settings import Grouped
from slimbench.methods.kernels.rounding import round_to_grid

if TYPE_CHECKING:
    from torch import nn

    from slimbench.methods.kernels.grid import Grid, QuantizedWeight

_FLOAT_BITS = {"bfloat16": 16, "float16": 16, "float32": 32}


@dataclass(frozen=True)
class LoRC(Grouped, Method):
    """Round-to-nearest and a low-rank part for the error, weight only, no data.

    Attributes:
        bits: Bits of a weight, before scales and low-rank part.
        symmetric: Centre the grid on zero; else fit it to the smallest and largest weight.
        rank: Of the low-rank part; 8 are 0.4 bits a weight where layers have 576 features.
    """

    name = "lorc"
    accepts = DENSE
    citation = Citation("ZeroQuant-V2 LoRC", year=2023, arxiv="2303.08302", covers=("quantization/zeroquant-v2-lorc",))
    produces = "packed"

    bits: Literal[2, 3, 4, 8] = 4
    symmetric: bool = True
    rank: int = 8

    @property
    def weight_grid(self) -> str:
        return uniform_grid(self.symmetric)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be positive, not {self.rank}")

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        if self.rank > shape.hidden_size:
            raise Unsupported(f"rank {self.rank} is more than the {shape.hidden_size} features of a hidden state")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.formats import packed

        model = dense.load()
        layers = block_linears(model)
        check_groups(layers, self.group_size)
        grid = packed.Grid(self.bits, self.group_size)
        packed.save(model, self._weights(layers, grid, dense), out)
        details = {"symmetric": self.symmetric, "rank": self.rank, "stored_bits": self.stored_bits(layers, dense.dtype)}
        return Claim(self.produces, bits=self.bits, group_size=self.group_size, details=details)

    def stored_bits(self, layers: dict[str, nn.Linear], dtype: str) -> float:
        """Bits of a weight with what belongs to its scales, offsets and low-rank part, rounded up to four digits; biases too."""
        numbers, weights = 0.0, 0
        for layer in layers.values():
            rows, columns = layer.weight.shape
            numbers += rows * columns / (self.group_size or columns) * (1 if self.symmetric else 2)
            numbers += min(self.rank, rows, columns) * (rows + columns) + (0 if layer.bias is None else rows)
            weights += rows * columns
        return round(self.bits + _FLOAT_BITS[dtype] * numbers / weights + 5e-5, 4)

    def _weights(self, layers: dict[str, nn.Linear], grid: Grid, dense: DenseModel) -> Iterator[tuple[str, QuantizedWeight]]:
        from slimbench.methods.core.low_rank import closest
        from slimbench.methods.kernels.grid import LowRank

        for done, (name, layer) in enumerate(layers.items()):
            weight = layer.weight.detach()
            rounded = round_to_grid(weight, grid, self.symmetric)
            factors = closest(weight.float() - rounded.dequantize().float(), self.rank)
            yield name, replace(rounded, low_rank=LowRank(*(factor.to(weight.dtype) for factor in factors)))
            dense.progress(done + 1, len(layers))
