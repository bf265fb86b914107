"""QuaRot: rotate the model so that its activations have no outliers, then quantize weights and activations to four bits.

Hidden states are rotated by an orthogonal matrix that lies in the weights (`methods.core.architecture.rotation`), in two steps: gains of
norms are folded away, then the residual stream is rotated. The inputs of the down projection go through a Hadamard transform while
the model runs, in the widest blocks whose size is a power of two that divides them; so do those of the output projection, and where
such a block is not wider than a head, its transform lies in the value projection instead. Inputs are rounded symmetrically by token,
their largest magnitude times `activation_clip` being the end of the grid; weights by row, with a search for the least squared error.
Keys and values keep their dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.layers import block_linears, check_groups
from slimbench.methods.core.settings import Coded, Grouped, SecondOrder

if TYPE_CHECKING:
    from slimbench.methods.kernels.grid import Grid
    from slimbench.methods.quantization.solvers.rotated import Quantizer


@dataclass(frozen=True)
class QuaRotRTN(Coded, Grouped, Method):
    """QuaRot whose weights go to nearest. Rounding of inputs is simulated; weights are packed.

    Attributes:
        bits: Bits of a weight, before scales.
        group_size: Inputs that share one scale of the weights; None for one scale a row, as in the paper.
        activation_bits: Bits of an input.
        activation_clip: Share of a token's largest magnitude that the grid reaches to, 0..1.
        seed: Of the rotation.
    """

    name = "quarot-rtn"
    citation = Citation("QuaRot", year=2024, arxiv="2404.00456", covers=("quantization/quarot-spinquant",))
    produces = "runtime"
    draws = True
    weight_grid = uniform_grid(symmetric=True, range_="searched")

    bits: Literal[2, 3, 4, 8] = 4
    group_size: Literal[32, 64, 128, 256] | None = None
    activation_bits: Literal[4, 6, 8] = 4
    activation_clip: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.activation_clip <= 1:
            raise ValueError(f"activation_clip must be above 0 and at most 1, not {self.activation_clip}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.formats import packed, runtime
        from slimbench.methods.quantization.solvers import rotated as _rotated

        model = dense.load(dtype=torch.float32)
        check_groups(block_linears(model), self.group_size)
        transforms = rotated(model, self.seed + dense.seed)
        grid = runtime.ActivationGrid("int", self.activation_bits, clip=self.activation_clip)
        weights = self._quantizer(packed.Grid(self.bits, self.group_size), calibration, dense)
        _rotated.save(model, transforms, grid, weights, dense, out)
        details = {"rotation": "orthogonal ⊗ hadamard", "transforms": sorted(set(transforms.values())), "head": "untied"}
        return Claim(
            self.produces,
            bits=self.bits,
            group_size=self.group_size,
            activation_bits=self.activation_bits,
            simulated=True,
            details=details,
        )

    def _quantizer(self, grid: Grid, calibration: Calibration, dense: DenseModel) -> Quantizer:
        from slimbench.methods.quantization.solvers import rotated as _rotated

        return _rotated.to_nearest(grid)


@dataclass(frozen=True)
class QuaRot(SecondOrder, QuaRotRTN):
    """QuaRot whose weights are quantized by GPTQ, block by block.

    Attributes:
        act_order: Treat the inputs with the largest activations first.
    """

    name = "quarot"
    needs = Needs(calibration=True)

    act_order: bool = False

    def _quantizer(self, grid: Grid, calibration: Calibration, dense: DenseModel) -> Quantizer:
        from slimbench.methods.core.second_order import Solver
        from slimbench.methods.quantization.solvers import rotated as _rotated

        return _rotated.by_gptq(grid, Solver(self.act_order, self.dampening), calibration.ids, dense)


def rotated(model: Any, seed: int) -> dict[str, int]:
    """Rotate a model in place.

    Returns:
        The layers whose inputs must go through a Hadamard transform while the model runs, with the size of its blocks.
    """
    from slimbench.methods.core.architecture.equivalent import links
    from slimbench.methods.core.architecture.rotation import orthogonal, rotate, transform_inputs, transform_outputs
    from slimbench.methods.formats.architecture.structure import blocks_of
    from slimbench.methods.kernels.numbers import largest_power_of_two

    rotate(model, orthogonal(model.config.hidden_size, seed))
    transforms: dict[str, int] = {}
    for block_name, block in blocks_of(model).items():
        for link in links(model, block_name, block, ("value", "up")):
            name, layer = link.first, link.layers[link.first]
            block_size = largest_power_of_two(layer.in_features)
            transform_inputs(layer, block_size)
            if link.kind == "value" and link.heads[1] % block_size == 0:  # no block of the transform crosses a head
                transform_outputs(link.source, block_size)  # type: ignore[arg-type]
            else:
                transforms[name] = block_size
    return transforms
