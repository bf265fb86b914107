"""HQQ: zero points that fit the weights under a norm that forgives outliers, found by half-quadratic splitting. No data.

With w = (q - z) · s and q = round(w / s + z), the solver alternates between an error e, shrunk as an l_p norm with p < 1 asks for, and
the zero point z that the mean of q - (w - e) / s gives, while it tightens the tie between the two.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs, Unsupported
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.layers import block_linears, check_groups
from slimbench.methods.core.settings import FittedGrid, Grouped
from slimbench.methods.quantization.grids.codes import check_equal, from_zero_points

if TYPE_CHECKING:
    from torch import nn

    from slimbench.methods.kernels.grid import QuantizedWeight


@dataclass(frozen=True)
class HQQ(FittedGrid, Grouped, Method):
    """Half-quadratic quantization, weight only, groups along the inputs.

    The library rounds the zero points of 4-bit grids to whole codes and leaves those of other widths as they are; it keeps its
    scales in float32, which become the model's dtype here.

    Attributes:
        bits: Bits of a weight, before scales.
        group_size: Consecutive inputs that share one scale and one zero point.
        symmetric: What it has not: zero points are what it fits.
    """

    name = "hqq"
    accepts = DENSE
    citation = Citation("HQQ", year=2023, covers=("quantization/hqq",))
    reference = "hqq:core.quantize.Quantizer"
    needs = Needs(extra="quantization", modules=("hqq",))
    produces = "packed"

    bits: Literal[2, 3, 4, 8] = 4
    group_size: Literal[32, 64, 128, 256] = 64

    @property
    def weight_grid(self) -> str:
        return uniform_grid(False, "searched")

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        if self.symmetric:
            raise Unsupported("hqq fits zero points, which a symmetric grid does not have")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        """Quantize one layer after the other.

        Raises:
            RuntimeError: The packed weights are not those of the library.
        """
        from slimbench.methods.formats import packed

        model = dense.load()
        layers = block_linears(model)
        check_groups(layers, self.group_size)
        packed.save(model, self._weights(layers, dense), out)
        return Claim(self.produces, bits=self.bits, group_size=self.group_size, details={"symmetric": False})

    def _weights(self, layers: dict[str, nn.Linear], dense: DenseModel) -> Iterator[tuple[str, QuantizedWeight]]:
        from slimbench.methods.kernels.grid import Grid

        with contextlib.redirect_stdout(sys.stderr):
            from hqq.core.quantize import BaseQuantizeConfig, Quantizer

        settings: dict[str, Any] = BaseQuantizeConfig(nbits=self.bits, group_size=self.group_size, axis=1)["weight_quant_params"]
        for done, (name, layer) in enumerate(layers.items()):
            rows, _ = layer.weight.shape
            codes, meta = Quantizer.quantize(layer.weight.detach().float(), device=dense.device, bitpack=False, **settings)
            scales, zeros = meta["scale"].view(rows, -1), meta["zero"].view(rows, -1)
            codes = codes.view(layer.weight.shape)
            weight = from_zero_points(codes, scales, zeros, Grid(self.bits, self.group_size), layer.weight.dtype)
            groups = codes.unflatten(1, (scales.shape[1], -1))
            check_equal(name, weight, ((groups - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)).flatten(1))
            yield name, weight
            dense.progress(done + 1, len(layers))
