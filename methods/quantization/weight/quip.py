"""QuIP: weights made alike by a random rotation, then rounded to 2 bits column by column (LDLQ, which is GPTQ's loop)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.layers import block_linears, check_calibration, check_groups
from slimbench.methods.core.settings import Coded, Grouped, SecondOrder

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.core.second_order import Moments
    from slimbench.methods.formats.runtime import InputPlan
    from slimbench.methods.kernels.grid import QuantizedWeight


@dataclass(frozen=True)
class QuIP(Coded, Grouped, SecondOrder, Method):
    """The inputs of every layer are rotated when the model runs: signs, and a Hadamard transform in blocks of the largest power of two
    that divides the inputs. See `methods.quantization.solvers.incoherence`.

    The paper rotates the outputs too, with one scale for the whole matrix. Here every row has its own scale, which takes care of
    rows of different size, and the rotation of the outputs is left out; so are the paper's greedy passes after the loop. Grids are
    the best ones for a normal distribution, where the paper has a constant that was tuned. Weight only; embeddings and output head
    keep their dtype.

    Attributes:
        bits: Bits of a weight, before scales.
        group_size: Consecutive rotated inputs that share one scale; None for one scale a row.
        rescale: Scale the inputs before the rotation, by what they and the weights are, so that the bound on the error is least.
        seed: Of the signs.
    """

    name = "quip"
    accepts = DENSE
    citation = Citation("QuIP", year=2023, arxiv="2307.13304", covers=("quantization/quip",))
    needs = Needs(calibration=True)
    produces = "runtime"
    draws = True
    weight_grid = uniform_grid(symmetric=False, range_="fixed")

    bits: Literal[2, 3, 4] = 2
    group_size: Literal[32, 64, 128, 256] | None = None
    rescale: bool = True
    seed: int = 0

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.formats import packed, runtime
        from slimbench.methods.quantization.solvers.blockwise import Tally, quantize_blocks
        from slimbench.methods.quantization.solvers.incoherence import plan_for, quantize, rotate_back

        calibration = check_calibration(calibration, dense.shape)
        model = dense.load()
        check_groups(block_linears(model), self.group_size)
        grid, tally = packed.Grid(self.bits, self.group_size), Tally()
        generator = torch.Generator().manual_seed(self.seed + dense.seed)
        plans: dict[str, InputPlan] = {}

        def quantizer(name: str, weight: Tensor, moments: Moments) -> QuantizedWeight:
            plans[name] = plan_for(weight, moments, self.rescale, generator)
            return quantize(weight, moments, plans[name], grid, self.dampening)

        def expand(name: str, weight: QuantizedWeight) -> Tensor:
            return rotate_back(weight.dequantize(), plans[name])

        weights = list(tally.count(quantize_blocks(model, calibration.ids, quantizer, dense.progress, expand=expand)))
        runtime.save(model, out, plans, weights)
        blocks = sorted({plan.hadamard for plan in plans.values() if plan.hadamard})
        details = {"hadamard_blocks": blocks, "rescale": self.rescale} | tally.details()
        return Claim(self.produces, bits=self.bits, group_size=self.group_size, details=details)
