"""LoftQ: the quantized weight and the start of its adapter are chosen together, so that both make up the dense weight.

From A₀ = B₀ = 0, for t = 1 … T:

    Q_t = q(W − A_{t−1} B_{t−1}),      A_t B_t = the best approximation of rank r to W − Q_t

where q rounds to the nearest point of the symmetric grid, and the approximation, by singular values, is split evenly between both
factors. Then the adapters are trained over the frozen Q_T; they stay beside it in the artefact, as the
low-rank part of the packed weights.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs, Unsupported
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.settings import Grouped
from slimbench.methods.core.training import TrainingSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from slimbench.methods.kernels.grid import Grid, QuantizedWeight


@dataclass(frozen=True)
class LoftQ(TrainingSettings, Grouped, Method):
    """A packed base with adapters in the dtype of the model; embeddings, norms and head are left alone.

    Attributes:
        bits: Bits of a weight of the base, before scales.
        rank: Of the adapters.
        iterations: Rounds of quantizing and decomposing, T.
    """

    name = "loftq"
    accepts = DENSE
    citation = Citation("LoftQ", year=2023, arxiv="2310.08659", covers=("quantization/loftq",))
    needs = Needs(calibration=True, training=True, extra="quantization", modules=("peft",))
    produces = "packed"
    weight_grid = uniform_grid(symmetric=True)

    bits: Literal[2, 3, 4] = 4
    group_size: Literal[32, 64, 128, 256] = 64
    rank: int = 16
    iterations: int = 5
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or self.iterations < 1:
            raise ValueError(f"rank and iterations must be at least 1, not {self.rank} and {self.iterations}")

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        if self.rank > (least := min(shape.hidden_size, shape.num_kv_heads * shape.head_dim)):
            raise Unsupported(f"rank {self.rank} is more than the {least} outputs of the narrowest layer")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.core.layers import block_linears, check_groups
        from slimbench.methods.core.low_rank import stored, train_adapters
        from slimbench.methods.formats import packed
        from slimbench.methods.quantization.solvers import qat as _qat

        grid, dtype = packed.Grid(self.bits, self.group_size), getattr(torch, dense.dtype)
        model = _qat.load_float32(dense)
        layers = block_linears(model)
        check_groups(layers, self.group_size)
        weights, initial = {}, {}
        for index, (name, layer) in enumerate(layers.items()):
            weights[name], *start = decompose(layer.weight.detach(), grid, self.rank, self.iterations, dtype)
            initial[name] = (start[0], start[1])
            layer.weight.copy_(weights[name].dequantize())
            dense.progress(index + 1, len(layers))
        factors, done = train_adapters(model, self, self.rank, float(self.rank), calibration.ids, dense, initial)
        made = stored(factors, dtype)
        whole = {name: replace(weight, low_rank=made[name]) for name, weight in weights.items()}
        _qat.save_weights(model, whole.items(), dense, out)
        details = {"symmetric": True, "rank": self.rank, "stored_bits": stored_bits(whole.values())}
        return done.added_to(Claim(self.produces, bits=self.bits, group_size=self.group_size, details=details))


def stored_bits(weights: Collection[QuantizedWeight]) -> float:
    """Bits of a weight with its scales and its adapter."""
    kept = [t for w in weights if w.low_rank for t in (w.packed_codes(), w.scales, *w.low_rank.parts().values())]
    return 8 * sum(tensor.nbytes for tensor in kept) / sum(w.codes.numel() for w in weights)


def decompose(weight: Tensor, grid: Grid, rank: int, iterations: int, dtype: torch.dtype) -> tuple[QuantizedWeight, Tensor, Tensor]:
    """A quantized weight and the factors [rank, in] and [out, rank] of what it lacks.

    Args:
        weight: float32 [out, in].
        dtype: In which the scales are stored.
    """
    from slimbench.methods.core.low_rank import closest
    from slimbench.methods.kernels.rounding import round_to_grid

    first, second = weight.new_zeros(rank, weight.shape[1]), weight.new_zeros(weight.shape[0], rank)
    for _ in range(iterations):
        quantized = round_to_grid((weight - second @ first).to(dtype), grid)
        first, second = closest(weight - quantized.dequantize().float(), rank)
    return quantized, first, second
