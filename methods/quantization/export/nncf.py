"""NNCF weight compression: an OpenVINO graph whose weights are int8 by row, or int4 in groups."""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.settings import Grouped


@dataclass(frozen=True)
class NNCF(Grouped, Method):
    """Round-to-nearest without data, weight only, as `nncf.compress_weights` does by default: embedding and output head take 8 bits.

    Attributes:
        bits: Bits of a weight inside the blocks, before scales; embedding and head have 8 in any case.
        group_size: Inputs that share one scale; None for one scale a row, as 8 bits have it.
        symmetric: Centre the grid on zero; else fit it to the smallest and largest weight.
    """

    name = "nncf"
    citation = Citation("NNCF weight compression", year=2020, arxiv="2002.08679")
    reference = "nncf:compress_weights"
    needs = Needs(extra="engines", modules=("openvino", "nncf"))
    produces = "openvino"

    bits: Literal[4, 8] = 4
    symmetric: bool = True

    @property
    def weight_grid(self) -> str:
        return uniform_grid(self.symmetric)

    def __post_init__(self) -> None:
        if self.bits == 8 and self.group_size is not None:
            raise ValueError(f"8 bits have one scale a row: group_size must be null, not {self.group_size}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import nncf
        import openvino

        from slimbench.methods.formats import openvino as _openvino

        mode = nncf.CompressWeightsMode[f"INT{self.bits}_{'SYM' if self.symmetric else 'ASYM'}"]
        settings = {} if self.bits == 8 else {"group_size": self.group_size or -1, "ratio": 1.0}
        nncf.set_log_level(logging.ERROR)
        with contextlib.redirect_stdout(sys.stderr):
            graph = nncf.compress_weights(_openvino.convert(dense.path), mode=mode, **settings)
        openvino.save_model(graph, out / _openvino.IR, compress_to_fp16=False)
        shutil.copyfile(dense.path / "config.json", out / "config.json")
        details = {"symmetric": self.symmetric, "head_bits": 8}
        return Claim(self.produces, bits=self.bits, group_size=self.group_size, details=details)
