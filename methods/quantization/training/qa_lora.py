"""QA-LoRA: a low-rank adapter that sees the inputs of a group only as their sum, so that it melts into the group's offset.

The weight of group g is w = s · (q − mid) + o[g] with frozen codes q and scales s. The adapter pools the inputs of each group,

    y = w x + c · B A p,   p[g] = Σ x[i] over i in g,   A [rank, groups],   B [out, rank],   c = alpha / rank

which is, without any approximation, the same layer with the offsets o + c · B A. So after training the artefact is an asymmetric grid
like any other: no adapter is left, and nothing is rounded again but the offsets, once, to the dtype in which they are stored. In
training they are rounded too, so that the trained layer is the stored one.

The paper starts from GPTQ's codes; here the start is rounding to nearest on the asymmetric grid of each group.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.settings import Adapters, Grouped
from slimbench.methods.core.training import TrainingSettings


@dataclass(frozen=True)
class QALoRA(Adapters, TrainingSettings, Grouped, Method):
    """Asymmetric groups, weight only; embeddings, norms and head are left alone.

    Attributes:
        bits: Bits of a weight, before scales.
        group_size: Inputs that share scale and offset, and that the adapter pools.
    """

    name = "qa-lora"
    accepts = DENSE
    citation = Citation("QA-LoRA", year=2023, arxiv="2309.14717", covers=("quantization/qa-lora", "peft/qlora-qa-lora"))
    needs = Needs(calibration=True, training=True)
    produces = "packed"
    weight_grid = uniform_grid(symmetric=False, range_="learned")

    bits: Literal[2, 3, 4] = 4
    group_size: Literal[32, 64, 128, 256] = 32
    learning_rate: float = 2e-4

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.kernels.grid import Grid
        from slimbench.methods.kernels.rounding import round_to_grid
        from slimbench.methods.quantization.grids.trained_layers import PooledAdapterLinear
        from slimbench.methods.quantization.solvers import qat as _qat

        grid, dtype = Grid(self.bits, self.group_size), getattr(torch, dense.dtype)
        generator = torch.Generator().manual_seed(self.seed + dense.seed)
        model = _qat.load_float32(dense)
        layers = _qat.put_in(
            model,
            self.group_size,
            lambda layer: PooledAdapterLinear(
                layer, round_to_grid(layer.weight.to(dtype), grid, symmetric=False), self.rank, self.alpha / self.rank, generator
            ),
        )
        parameters = {
            f"{name}.adapter_{part}": getattr(layer, f"adapter_{part}") for name, layer in layers.items() for part in ("in", "out")
        }
        done = _qat.fit(model, parameters, self, calibration.ids, dense)
        _qat.save(model, layers, dense, out)
        details = {"symmetric": False, "rank": self.rank, "merged": "into the offsets"}
        return done.added_to(Claim(self.produces, bits=self.bits, group_size=self.group_size, details=details))
