"""LLM-QAT: quantization-aware training without data, on text that the dense model wrote itself and against its distributions.

Weights are rounded symmetrically to the largest magnitude of their row or group (MinMax; nothing is clipped, since outliers matter):

    w_q = α · round(w / α),   α = max|w| / (2^(bits−1) − 1)

All parameters are trained, gradients passing the rounding unchanged. The loss is the cross entropy with the teacher's distribution over
the whole vocabulary. Of the paper's 8-bit activations and its quantized KV cache nothing is done here: weights only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.settings import Coded, Grouped
from slimbench.methods.core.training import TrainingSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from slimbench.methods.kernels.grid import Grid, QuantizedWeight


@dataclass(frozen=True)
class LLMQAT(TrainingSettings, Coded, Grouped, Method):
    """Full-parameter training of a weight-only quantized model; embeddings, norms and head are trained too, but keep their dtype.

    Attributes:
        bits: Bits of a weight, before scales.
        sequences: Texts that the model writes, of `length` tokens each; the paper has 100,000.
        greedy_tokens: Tokens after the first, random one that are the most probable ones, 3 to 5 in the paper; the rest is drawn.
        generation_batch: Texts written at once.
    """

    name = "llm-qat"
    accepts = DENSE
    least_steps = 1000
    citation = Citation("LLM-QAT", year=2023, arxiv="2305.17888", covers=("quantization/full-parameter-llm-qat",))
    needs = Needs(training=True)
    produces = "packed"
    weight_grid = uniform_grid(symmetric=True)

    bits: Literal[2, 3, 4, 8] = 4
    group_size: Literal[32, 64, 128, 256] | None = None
    steps: int = 30
    sequences: int = 96
    greedy_tokens: int = 4
    generation_batch: int = 96
    learning_rate: float = 5e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequences < 1 or self.generation_batch < 1:
            raise ValueError(f"sequences and generation_batch must be at least 1, not {self.sequences} and {self.generation_batch}")
        if not 0 <= self.greedy_tokens < self.length:
            raise ValueError(f"greedy_tokens must be in [0, {self.length}), not {self.greedy_tokens}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.kernels.grid import Grid
        from slimbench.methods.quantization.grids.trained_layers import RoundedLinear
        from slimbench.methods.quantization.solvers import qat as _qat
        from slimbench.util.writing.own import generate

        seed = self.seed + dense.seed
        ids = generate(dense, self.sequences, self.length, self.greedy_tokens, self.generation_batch, seed)
        grid, dtype = Grid(self.bits, self.group_size), getattr(torch, dense.dtype)
        model = _qat.load_float32(dense)
        layers = _qat.put_in(model, self.group_size, lambda layer: RoundedLinear(layer, grid, dtype, min_max))
        done = _qat.fit(model, dict(model.named_parameters()), self, ids, dense)
        _qat.save(model, layers, dense, out)
        return done.added_to(
            Claim(self.produces, bits=self.bits, group_size=self.group_size, details={"generated_tokens": ids.numel(), "symmetric": True})
        )


def min_max(weight: Tensor, grid: Grid, dtype: torch.dtype) -> QuantizedWeight:
    """Codes and scales of the symmetric MinMax grid; the scales are rounded to the dtype in which they are stored."""
    import torch

    from slimbench.methods.kernels.grid import QuantizedWeight

    most = 2 ** (grid.bits - 1) - 1
    groups = weight.unflatten(1, (-1, grid.group_size or weight.shape[1]))
    scales = (groups.abs().amax(-1) / most).to(dtype)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    codes = (groups / scales.float().unsqueeze(-1)).round().clamp(-most, most).flatten(1) + grid.mid
    return QuantizedWeight(grid, codes.to(torch.int8 if grid.bits == 8 else torch.uint8), scales)
