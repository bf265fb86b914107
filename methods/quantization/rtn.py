"""RTN: every weight goes to the nearest point of its group's uniform grid. No data, no optimisation: the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from methods._common import block_linears, check_groups
from methods.base import Calibration, Citation, Claim, DenseModel, Method, ModelShape
from methods.quantization._grid import round_layers


@dataclass(frozen=True)
class RTN(Method):
    """Round-to-nearest, weight only. Embeddings and output head keep their dtype.

    Attributes:
        bits: Bits of a weight, before scales.
        group_size: Inputs that share one scale; None for one scale a row.
        symmetric: Centre the grid on zero; else fit it to the smallest and largest weight.
    """

    family: ClassVar[str] = "quantization"
    citation: ClassVar[Citation] = Citation("Round-to-nearest", year=2022, covers=("quantization/rtn-round-to-nearest",))
    reference: ClassVar[str] = "paper"
    produces: ClassVar[str] = "packed"

    bits: Literal[4, 8] = 4
    group_size: Literal[32, 64, 128, 256] | None = 64
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits == 4 and self.group_size is None:
            raise ValueError("4 bits need a group_size: 32, 64, 128 or 256")
        if self.bits == 8 and self.group_size is not None:
            raise ValueError(f"8 bits have one scale a row: group_size must be null, not {self.group_size}")

    def check(self, shape: ModelShape) -> None:
        if self.group_size:
            shape.check_group(self.group_size)

    def compress(self, dense: DenseModel, calibration: Calibration | None, out: Path) -> Claim:
        from methods.kernels import packed

        model = dense.load()
        layers = block_linears(model)
        check_groups(layers, self.group_size)
        packed.save(model, round_layers(layers, packed.Grid(self.bits, self.group_size), self.symmetric), out)
        return Claim(self.produces, bits=self.bits, group_size=self.group_size, details={"symmetric": self.symmetric})
