"""Mixed precision: each layer gets 2, 3, 4 or 8 bits, so that the predictions change least within a budget of bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.layers import block_linears, check_calibration, check_groups
from slimbench.methods.core.settings import Grouped, SecondOrder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slimbench.methods.kernels.grid import Grid, QuantizedWeight

BITS: tuple[Literal[2, 3, 4, 8], ...] = (2, 3, 4, 8)
_SENSITIVITY_TOKENS = 8192


@dataclass(frozen=True)
class MixedPrecision(Grouped, SecondOrder, Method):
    """Sensitivities by the Fisher information of a layer's outputs, widths by a knapsack: see `methods.core.allocate`.

    As HAWQ-V3, but with the measured output error in the place of the Hessian's trace times the squared change of the weights, and
    with the size of the model as the only constraint. At most 8,192 calibration tokens are used for it. Layers of 8 bits have one scale
    a row. Weight only; embeddings and output head keep their dtype.

    Attributes:
        average_bits: Bits of a weight, before scales, on average over the layers inside the blocks: 2..8.
        group_size: Consecutive inputs that share one scale in layers of 2, 3 and 4 bits.
        symmetric: Centre the grid on zero; else fit it to both ends of the range.
        clip: None searches the range of each group that has the least squared rounding error; False takes it from the smallest to the
            largest weight.
        rounding: To `nearest`, or column by column with `second-order` information, largest activations first.
        dampening: Added to the Hessian's diagonal, as a fraction of its mean; for second-order rounding.
    """

    name = "mixed-precision"
    accepts = DENSE
    citation = Citation("Mixed precision by sensitivity (HAWQ-V3)", year=2020, arxiv="2011.10680")
    needs = Needs(calibration=True)
    produces = "packed"
    draws = True

    average_bits: float = 4.0
    group_size: Literal[32, 64, 128, 256] = 64
    symmetric: bool = True
    clip: Literal[False] | None = None
    rounding: Literal["nearest", "second-order"] = "second-order"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not min(BITS) <= self.average_bits <= max(BITS):
            raise ValueError(f"average_bits must be between {min(BITS)} and {max(BITS)}, not {self.average_bits:g}")

    @property
    def weight_grid(self) -> str:
        return uniform_grid(self.symmetric, "min-max" if self.clip is False else "searched")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.formats import packed
        from slimbench.methods.quantization.solvers.blockwise import Tally

        calibration = check_calibration(calibration, dense.shape)
        model = dense.load()
        check_groups(block_linears(model), self.group_size)
        grids, tally = self.choose(model, calibration, dense.seed), Tally()
        packed.save(model, tally.count(self._weights(model, calibration, grids, dense)), out)
        details = {
            "symmetric": self.symmetric,
            "rounding": self.rounding,
            "layers_by_bits": {str(bits): count for bits, count in sorted(Counter(grid.bits for grid in grids.values()).items())},
        }
        bits = tally.code_bits / tally.weights
        return Claim(self.produces, bits=bits, group_size=tally.group_size, details=details | tally.details())

    def choose(self, model: PreTrainedModel, calibration: Calibration, seed: int) -> dict[str, Grid]:
        """The grid of each layer by its full name."""
        from slimbench.methods.core.allocate import allocate, divergences
        from slimbench.methods.formats.architecture.structure import blocks_of
        from slimbench.methods.kernels.grid import Grid

        blocks = tuple(f"{name}." for name in blocks_of(model))
        layers = {name: layer for name, layer in block_linears(model).items() if name.startswith(blocks)}
        offered = [Grid(bits, None if bits == 8 else self.group_size) for bits in BITS]
        ids = calibration.ids[: max(1, _SENSITIVITY_TOKENS // calibration.ids.shape[1])]
        costs = divergences(model, layers, ids, offered, self.symmetric, seed=seed, clip=self.clip is not False)
        sizes = [layer.weight.numel() for layer in layers.values()]
        chosen = allocate(list(costs.values()), sizes, BITS, self.average_bits)
        return {name: offered[index] for name, index in zip(layers, chosen, strict=True)}

    def _weights(
        self, model: PreTrainedModel, calibration: Calibration, grids: dict[str, Grid], dense: DenseModel
    ) -> Iterator[tuple[str, QuantizedWeight]]:
        from slimbench.methods.core.second_order import Solver, quantize
        from slimbench.methods.kernels.rounding import round_to_grid
        from slimbench.methods.quantization.solvers.blockwise import quantize_blocks

        if self.rounding == "nearest":
            layers = block_linears(model)
            for name, grid in grids.items():
                yield name, round_to_grid(layers[name].weight.detach(), grid, self.symmetric, self.clip is not False)
        else:
            solver = Solver(dampening=self.dampening)
            yield from quantize_blocks(
                model,
                calibration.ids,
                lambda name, weight, moments: quantize(weight, moments, grids[name], solver, self.symmetric, self.clip is not False),
                dense.progress,
            )
