"""The uncompressed model: the reference of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slimbench.methods.base import HUGGINGFACE, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.formats.huggingface import link_source


@dataclass(frozen=True)
class Dense(Method):
    """The source as it is; only a source stored in another dtype is converted to the model's."""

    name = "dense"
    family = "dense"
    citation = Citation("Uncompressed model", year=2017)
    reference = "transformers:AutoModelForCausalLM"
    needs = Needs(weights=False)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        """Link the files of the source, or copy them across file systems: the artefact is the same bytes."""
        link_source(dense, out)
        return Claim(format=HUGGINGFACE)
