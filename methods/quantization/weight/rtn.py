"""RTN: every weight goes to the nearest point of its group's uniform grid. No data, no optimisation: the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.layers import block_linears, check_groups
from slimbench.methods.core.settings import Coded, Grouped
from slimbench.methods.kernels.rounding import round_head, round_layers


@dataclass(frozen=True)
class RTN(Coded, Grouped, Method):
    """Round-to-nearest, weight only.

    Attributes:
        bits: Bits of a weight, before scales.
        symmetric: Centre the grid on zero; else fit it to the smallest and largest weight.
        clip: Search the range of each group that has the least squared rounding error; None: to the largest weight.
        head_bits: Bits of the output head, and of an input embedding that shares its weight; None: they keep their dtype.
    """

    name = "rtn"
    accepts = DENSE
    citation = Citation("Round-to-nearest", year=2022, covers=("quantization/rtn-round-to-nearest",))
    produces = "packed"

    bits: Literal[2, 3, 4, 8] = 4
    symmetric: bool = True
    clip: Literal[True] | None = None
    head_bits: Literal[4, 8] | None = None

    @property
    def weight_grid(self) -> str:
        return uniform_grid(self.symmetric, "searched" if self.clip else "min-max")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.formats import packed

        model = dense.load()
        layers = block_linears(model)
        check_groups(layers, self.group_size)
        weights = round_layers(layers, packed.Grid(self.bits, self.group_size), self.symmetric, bool(self.clip))
        packed.save(model, chain(weights, round_head(model, self.head_bits)), out)
        details = {"symmetric": self.symmetric, "head_bits": self.head_bits}
        return Claim(self.produces, bits=self.bits, group_size=self.group_size, details=details)
