"""SpinQuant: rotations as in QuaRot, but learned, so that the rounded network loses least.

One rotation R1 of the hidden states and one R2 for each block, of the heads between value and output projection, lie in the weights;
the inputs of the down projection go through a Hadamard transform while the model runs (R4). R1 and R2 minimize the loss of the
network with rounded activations and weights in full precision over the orthogonal matrices (eq. 2), by gradient descent along
Cayley transforms (eq. 3, `methods.quantization.solvers.cayley`). Then the weights of the rotated model are quantized by row.

Inputs are rounded by token, asymmetrically between their smallest and their largest value. Keys and values keep their dtype, so the
online transform of queries and keys (R3), which serves a quantized cache alone, is left out.

On SmolLM2-135M W4A4 is no better than QuaRot: perplexity 48.7 against 45.8 (dense 20.3), measured with 100 steps of 4 × 128 tokens, against
the authors' 8 × 2048. The grid of inputs is not why: under one random rotation, with weights in full precision, this one loses less than
QuaRot's. Nor is the output projection, whose inputs both transform within heads there, in the weights. What learning has to beat is strong:
it starts from Hadamard matrices, which spread an outlier evenly, where orthogonal matrices without that structure lose far more. The
bound on a step, not the rate, sets its length as long as gradients are large, so that steps of few tokens, mostly noise, lead away from
there: the loss of the first batch went from 4.27 to 4.25 in the 100 steps of that run. A rate that is smaller by as much as a step sees
fewer tokens (0.05) is the setting to try. `spinquant-w4a4-sym` rounds inputs as QuaRot does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.layers import block_linears, check_groups
from slimbench.methods.core.settings import Coded, Grouped, SecondOrder
from slimbench.methods.core.training import LoopSettings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from slimbench.methods.kernels.grid import Grid
    from slimbench.methods.quantization.solvers.rotated import Quantizer


@dataclass(frozen=True)
class SpinQuantRTN(LoopSettings, Coded, Grouped, Method):
    """SpinQuant whose weights go to nearest. Rounding of inputs is simulated; weights are packed.

    Attributes:
        bits: Bits of a weight, before scales.
        group_size: Inputs that share one scale of the weights; None for one scale a row, as in the paper.
        activation_bits: Bits of an input.
        activation_symmetric: Round inputs on a grid centred on zero, as QuaRot does; None: between their smallest and their largest value.
        activation_clip: Share of its range that a token's grid reaches to, above 0 and at most 1; None: all of it.
        batch_size: Sequences of an update; the authors take 8.
        length: Tokens of a sequence at most; calibration windows are cut to it. The authors take 2048.
        seed: Of the first rotations and of the order of the text.
    """

    name = "spinquant-rtn"
    citation = Citation("SpinQuant", year=2024, arxiv="2405.16406", covers=("quantization/quarot-spinquant",))
    needs = Needs(calibration=True, training=True)
    produces = "runtime"
    weight_grid = uniform_grid(symmetric=True, range_="searched")

    bits: Literal[2, 3, 4, 8] = 4
    group_size: Literal[32, 64, 128, 256] | None = None
    activation_bits: Literal[4, 6, 8] = 4
    activation_symmetric: Literal[True] | None = None
    activation_clip: float | None = None
    steps: int = 100
    learning_rate: float = 1.5
    warmup: float = 0.0
    clip: float | None = None
    loss: Literal["distillation", "nll"] = "nll"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation_clip is not None and not 0 < self.activation_clip <= 1:
            raise ValueError(f"activation_clip must be above 0 and at most 1, not {self.activation_clip}")

    def optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        from slimbench.methods.quantization.solvers.cayley import CayleySGD

        return CayleySGD(parameters, self.learning_rate)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.architecture.rotation import fold_gains
        from slimbench.methods.core.training import cut, objective, train
        from slimbench.methods.formats import packed, runtime
        from slimbench.methods.quantization.solvers import qat as _qat
        from slimbench.methods.quantization.solvers import rotated as _rotated
        from slimbench.methods.quantization.solvers.learned_rotation import Rotations

        model = _qat.load_float32(dense)
        check_groups(block_linears(model), self.group_size)
        fold_gains(model)
        rotations = Rotations.random(model, self.seed + dense.seed)
        clip = 1.0 if self.activation_clip is None else self.activation_clip
        grid = runtime.ActivationGrid("int", self.activation_bits, symmetric=bool(self.activation_symmetric), clip=clip)
        with rotations.rounding(model, grid):
            done = train(self, rotations.parameters(), objective(self, model, dense), cut(calibration.ids, self.length), dense)
        transforms = rotations.rotate(model)
        _rotated.save(model, transforms, grid, self._quantizer(packed.Grid(self.bits, self.group_size), calibration, dense), dense, out)
        claim = Claim(
            self.produces,
            bits=self.bits,
            group_size=self.group_size,
            activation_bits=self.activation_bits,
            simulated=True,
            details={"rotation": "learned", "transforms": sorted(set(transforms.values())), "head": "untied"},
        )
        return done.added_to(claim)

    def _quantizer(self, grid: Grid, calibration: Calibration, dense: DenseModel) -> Quantizer:
        from slimbench.methods.quantization.solvers import rotated as _rotated

        return _rotated.to_nearest(grid)


@dataclass(frozen=True)
class SpinQuant(SecondOrder, SpinQuantRTN):
    """SpinQuant whose weights are quantized by GPTQ, block by block.

    Attributes:
        act_order: Treat the inputs with the largest activations first.
    """

    name = "spinquant"

    act_order: bool = False

    def _quantizer(self, grid: Grid, calibration: Calibration, dense: DenseModel) -> Quantizer:
        from slimbench.methods.core.second_order import Solver
        from slimbench.methods.quantization.solvers import rotated as _rotated

        return _rotated.by_gptq(grid, Solver(self.act_order, self.dampening), calibration.ids, dense)
