"""A toy structured method: it takes whole parts away and claims what is left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from slimbench.methods.base import DENSE, EDITED, Calibration, Citation, Claim, DenseModel, Method
from slimbench.methods.core.architecture import surgery
from slimbench.methods.formats.huggingface import save_dense


@dataclass(frozen=True)
class Halve(Method):
    """Half of the channels of the first MLP and the attention of the last block go; `forgotten` parameters are claimed to be gone too."""

    name = "halve"
    accepts = DENSE
    family = "test"
    citation = Citation("none", 2024)
    reference = "paper"
    produces = EDITED

    forgotten: int = 0

    def compress(self, dense: DenseModel, calibration: Calibration | None, out: Path) -> Claim:
        model = dense.load()
        first, last = "model.layers.0", f"model.layers.{dense.shape.num_layers - 1}"
        left = torch.arange(0, dense.shape.intermediate_size, 2)
        for layer, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            surgery.keep(model, f"{first}.mlp.{layer}.weight", left, dense.shape.intermediate_size, dim)
        surgery.remove_part(model, last, "attention")
        save_dense(model, out)
        counts = surgery.counts(model)
        counts["parameters"] -= self.forgotten
        return Claim(EDITED, **counts, cache_bytes_per_token=surgery.cache_bytes_per_token(model))
