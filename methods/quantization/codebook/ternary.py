"""Ternary weights in the manner of BitNet b1.58, fine-tuned from a dense model.

A weight becomes −γ, 0 or γ by the mean magnitude γ of its matrix (absmean), in each forward pass anew:

    w_q = γ · clip(round(w / γ), −1, 1),   γ = mean|w|

while the float weights behind it are trained, gradients passing the rounding unchanged. BitNet trains from scratch, on very much more
text, with 8-bit activations and further norms; here a dense model is the start, weights alone are ternary, and its architecture stays.
The codes take 2 bits on disk and in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.settings import Grouped, check_codes
from slimbench.methods.core.training import TrainingSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from slimbench.methods.core.training import Loss
    from slimbench.methods.kernels.grid import Grid, QuantizedWeight


@dataclass(frozen=True)
class TernaryQAT(TrainingSettings, Grouped, Method):
    """Full-parameter training under ternary weights; embeddings, norms and head are trained too, but keep their dtype.

    Attributes:
        group_size: Inputs that share one γ; None: the whole matrix does, as in the paper (stored once for each row).
    """

    name = "ternary-qat"
    accepts = DENSE
    least_steps = 1000
    citation = Citation("BitNet b1.58", year=2024, arxiv="2402.17764", covers=("quantization/bitnet-b1-b1-58",))
    needs = Needs(calibration=True, training=True)
    produces = "packed"
    weight_grid = uniform_grid(symmetric=True, range_="fixed")

    group_size: Literal[32, 64, 128, 256] | None = None
    steps: int = 30
    learning_rate: float = 5e-4

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        check_codes(shape, 2)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.kernels.grid import Grid
        from slimbench.methods.quantization.grids.trained_layers import RoundedLinear
        from slimbench.methods.quantization.solvers import qat as _qat

        grid, dtype = Grid(2, self.group_size), getattr(torch, dense.dtype)
        model = _qat.load_float32(dense)
        layers = _qat.put_in(model, self.group_size, lambda layer: RoundedLinear(layer, grid, dtype, self.ternary))
        done = _qat.fit(model, dict(model.named_parameters()), self, calibration.ids, dense, self.objective(model, dense))
        zeros = sum(int((layer.quantized().codes == grid.mid).sum()) for layer in layers.values())
        details = {"levels": 3, "zeros": zeros / sum(layer.weight.numel() for layer in layers.values())}
        _qat.save(model, layers, dense, out)
        teacher = "the model that the pipeline began with" if self.loss == "distillation" else None
        return done.added_to(Claim(self.produces, bits=2, group_size=self.group_size, teacher=teacher, details=details))

    @staticmethod
    def ternary(weight: Tensor, grid: Grid, dtype: torch.dtype) -> QuantizedWeight:
        """Ternary weights of float ones [out, in]."""
        return absmean(weight, grid, dtype)

    def objective(self, model: Any, dense: DenseModel) -> Loss:
        """What is minimized."""
        from slimbench.methods.core.training import objective

        return objective(self, model, dense)


def absmean(weight: Tensor, grid: Grid, dtype: torch.dtype) -> QuantizedWeight:
    """Ternary codes on a 2-bit grid, γ rounded to the dtype in which it is stored; a part without any weight but zero has γ = 1."""
    import torch

    from slimbench.methods.kernels.grid import QuantizedWeight

    groups = weight.unflatten(1, (-1, grid.group_size or weight.shape[1]))
    scales = groups.abs().mean(-1) if grid.group_size else weight.abs().mean().expand(weight.shape[0], 1)
    scales = scales.to(dtype)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    codes = (groups / scales.float().unsqueeze(-1)).round().clamp(-1, 1).flatten(1) + grid.mid
    return QuantizedWeight(grid, codes.to(torch.uint8), scales.contiguous())
