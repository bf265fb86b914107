"""Block-wise 8-bit quantization: blocks scaled by their largest magnitude, and 256 levels of a dynamic tree data type.

The levels of the tree are denser near zero: a code gives some of its bits to the exponent, the others to a linear fraction. The paper
stores the state of optimizers so; here it is the weights, as `bitsandbytes.functional.quantize_blockwise` rounds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs
from slimbench.methods.quantization.grids.codebook_layers import FORMAT, compress_layers

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.formats.codebook import CodebookWeight


@dataclass(frozen=True)
class Blockwise8Bit(Method):
    """Dynamic 8-bit levels, weight only, no data. Scales are float32, as in the library.

    Attributes:
        block_size: Inputs that share one scale.
    """

    name = "blockwise-8bit"
    citation = Citation(
        "8-bit optimizers (block-wise dynamic quantization)",
        year=2021,
        arxiv="2110.02861",
        covers=("quantization/quantile-block-wise-8-bit",),
    )
    reference = "bitsandbytes:functional.quantize_blockwise"
    needs = Needs(extra="quantization", modules=("bitsandbytes",))
    produces = FORMAT
    weight_grid = "codebook"

    block_size: Literal[64, 128, 256] = 64

    def check(self, shape: ModelShape) -> None:
        shape.check_group(self.block_size)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from bitsandbytes.functional import create_dynamic_map, quantize_blockwise

        from slimbench.methods.formats.codebook import CodebookWeight

        levels = create_dynamic_map().to(dense.device)
        table = levels.view(1, 1, -1, 1)

        def encode(_: str, weight: Tensor) -> CodebookWeight:
            codes, state = quantize_blockwise(weight.contiguous(), code=levels, blocksize=self.block_size)
            scales = state.absmax.view(1, len(weight), -1)
            return CodebookWeight.of(codes.view(1, *weight.shape), table, 8, weight.dtype, scales=scales)

        return compress_layers(dense, out, encode, bits=8, group_size=self.block_size)
