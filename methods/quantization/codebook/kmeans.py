"""Weight sharing by k-means: each weight is the index of one of 2^bits levels that minimise the squared error.

Lloyd's algorithm on all weights that share a table, from evenly spaced levels (which the paper finds best) and from quantiles; the
better result counts. Levels are rounded to the model's dtype and the indices then chosen for the rounded ones. The fine-tuning of
the levels and the Huffman coding of Deep Compression are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method
from slimbench.methods.core.settings import Coded
from slimbench.methods.quantization.grids.codebook_layers import FORMAT, compress_layers

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.formats.codebook import CodebookWeight


@dataclass(frozen=True)
class KMeans(Coded, Method):
    """K-means levels, weight only, no data.

    With one table for a whole layer, as in the paper, smollm2-135m diverges at 3 and at 4 bits although the weights keep 15 to 19 dB of
    signal to noise: the few largest weights of a layer fall to a level far below them. The shipped settings have a table for each row.

    Attributes:
        bits: Bits of an index.
        table: What has a table of its own: a layer, as in the paper, or each row (output) of a layer.
        steps: Steps of Lloyd's algorithm at most.
    """

    name = "kmeans"
    accepts = DENSE
    citation = Citation(
        "Deep Compression (k-means weight sharing)",
        year=2015,
        arxiv="1510.00149",
        covers=("quantization/underlying-quantization-schemes-zhao-z-et-al",),
    )
    produces = FORMAT
    weight_grid = "codebook"

    bits: Literal[2, 3, 4, 8] = 4
    table: Literal["layer", "row"] = "layer"
    steps: int = 50

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        return compress_layers(dense, out, self._encode, self.bits, details={"table": self.table})

    def _encode(self, _: str, weight: Tensor) -> CodebookWeight:
        from slimbench.methods.formats.codebook import CodebookWeight
        from slimbench.methods.quantization.grids import k_means as _kmeans

        numbers = weight.float() if self.table == "row" else weight.float().reshape(1, -1)
        levels = _kmeans.kmeans_rows(numbers, 2**self.bits, steps=self.steps).to(weight.dtype)
        codes = _kmeans.nearest(numbers, levels).view(weight.shape)
        return CodebookWeight.of(codes[None], levels[None, :, :, None], self.bits, weight.dtype)
