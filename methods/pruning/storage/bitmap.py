"""Storage without zeros: one bit a weight and the weights that are left, expanded in registers while the product runs.

For a layer [out, in] with n weights that are not zero, b bytes each, the artefact takes

    out · in / 8  +  4 (out + 1)  +  b n      bytes as a bitmap
    out · in / 8  +  b out · in / 2           bytes where at most two weights of each run of four inputs are not zero

in place of b out · in; the smaller form is taken. In bfloat16 that is 0.5625 of the dense bytes at 50 % zeros, 0.4625 at 60 %, 0.3625 at
70 %. A layer with less than about 6.25 % zeros (3.1 % in float32) would not be smaller and stays dense. No number changes.

Flash-LLM (arXiv 2309.10285) loads weights as sparse and computes as dense: its format of tiles with 16-bit places is expanded in shared
memory for the tensor cores of a card. Here the same is done in the registers of a processor, and a place takes a bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, Needs, Unsupported

if TYPE_CHECKING:
    from slimbench.methods.kernels.bitmap_linear import BitmapWeight, TwoOfFourWeight


@dataclass(frozen=True)
class Bitmap(Method):
    """The linear layers of the blocks without their zeros: the last step of a pipeline that prunes."""

    name = "sparse-bitmap"
    citation = Citation("Flash-LLM", year=2023, arxiv="2309.10285")
    needs = Needs(zeros=True)
    accepts = DENSE
    produces = "bitmap"

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.layers import block_linears
        from slimbench.methods.core.masks import zero_fraction
        from slimbench.methods.formats import bitmap
        from slimbench.methods.kernels.bitmap_linear import nbytes, smallest

        model = dense.load()
        layers = block_linears(model)
        sparsity = zero_fraction(layers)
        stored: dict[str, int] = {}

        def weights() -> Iterator[tuple[str, BitmapWeight | TwoOfFourWeight]]:
            for done, (name, layer) in enumerate(layers.items()):
                if (weight := smallest(layer.weight.detach())) is not None:
                    stored[name] = nbytes(weight)
                    yield name, weight
                dense.progress(done + 1, len(layers))

        found = dict(weights())
        if not found:
            raise Unsupported(f"no layer has enough zeros to be smaller without them: {sparsity:.1%} of the weights are zero")
        bitmap.save(model, found.items(), out)
        before = {name: layer.weight.nbytes for name, layer in layers.items()}
        taken = sum((before | stored).values())
        details = {
            "stored_bytes": taken,
            "of_dense_bytes": round(taken / sum(before.values()), 4),
            "dense_layers": len(layers) - len(stored),
        }
        return Claim(self.produces, sparsity=sparsity, details=details)
