"""SpQR: small groups rounded with second-order information, and the few weights that resist kept apart in 16 bits.

Columns are rounded in order. When a group is reached, the outliers among its weights are found first: those without which the squared
error of the group's other weights on a grid of their own, with the weight's own error, falls by more than a threshold. The error of
weight j counts (w_j - q_j)² / [F⁻¹]_jj, F the Hessian of the columns that are still free: what it costs the outputs after the others
have made up for it. The grid is then made without the outliers. The threshold is, for each layer, the one that `outlier_fraction` of
its original weights exceed; the paper sets it by hand. An outlier takes 48 bits with its position, where the paper's layout takes 32.
Weight only; embeddings and output head keep their dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs, Unsupported
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.layers import block_linears, check_calibration, check_groups
from slimbench.methods.core.settings import Grouped, SecondOrder
from slimbench.methods.quantization.grids.codebook_layers import FORMAT

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.core.second_order import Moments
    from slimbench.methods.formats.codebook import CodebookWeight


@dataclass(frozen=True, kw_only=True)
class _WithOutliers(SecondOrder, Method):
    """What both layouts share.

    Attributes:
        bits: Bits of a weight, before scales.
        outlier_fraction: Share of a layer's weights that the threshold keeps apart, 0..0.1.
    """

    bits: Literal[2, 3, 4] = 3
    outlier_fraction: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.outlier_fraction <= 0.1:
            raise ValueError(f"outlier_fraction must be above 0 and at most 0.1, not {self.outlier_fraction}")


@dataclass(frozen=True)
class SpQRBilevel(_WithOutliers):
    """SpQR in the two levels of the paper: groups of 16 weights between their smallest and their largest, their scales and zero points
    rounded to 3 bits in groups of 16 rows (`methods.formats.bilevel`). That is 3.6 bits a weight, and the outliers.

    Attributes:
        group_size: Consecutive inputs that share a scale and a zero point.
        scale_bits: Bits of a scale, and of a zero point.
    """

    name = "spqr-bilevel"
    accepts = DENSE
    citation = Citation("SpQR", year=2023, arxiv="2306.03078", covers=("quantization/spqr",))
    needs = Needs(calibration=True)
    produces = FORMAT
    weight_grid = uniform_grid(symmetric=False)

    group_size: Literal[16, 32, 64] = 16
    scale_bits: Literal[2, 3, 4] = 3

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        shape.check_group(self.group_size)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.formats import bilevel, codebook
        from slimbench.methods.quantization.grids.bilevel import quantize
        from slimbench.methods.quantization.solvers.blockwise import quantize_blocks

        calibration = check_calibration(calibration, dense.shape)
        model = dense.load()
        layers = block_linears(model)
        check_groups(layers, self.group_size)
        for name, layer in layers.items():
            if layer.out_features % bilevel.SPAN:
                raise Unsupported(f"second-level groups of {bilevel.SPAN} rows do not divide the {layer.out_features} outputs of {name}")
        table = torch.arange(2**self.bits, dtype=model.dtype, device=model.device).view(1, 1, -1, 1)
        apart = 0

        def quantizer(_: str, weight: Tensor, moments: Moments) -> CodebookWeight:
            nonlocal apart
            made = quantize(weight, moments, table, self.bits, self.group_size, self.scale_bits, self.dampening, self.outlier_fraction)
            apart += len(made.outliers.values) if made.outliers else 0
            return made

        stored = codebook.save(model, quantize_blocks(model, calibration.ids, quantizer, dense.progress), out)
        weights = sum(layer.weight.numel() for layer in layers.values())
        details = {"stored_bits": stored, "outlier_fraction": round(apart / weights, 6), "symmetric": False}
        return Claim(self.produces, bits=self.bits, group_size=self.group_size, details=details)


@dataclass(frozen=True)
class SpQR(Grouped, _WithOutliers):
    """SpQR in the packed format, for which there are kernels: groups of 32 weights on a symmetric grid, their scales in 16 bits.

    Attributes:
        group_size: Consecutive inputs that share one scale.
        symmetric: Centre the grid on zero; else fit it to both ends of the range, at 16 more bits for each group.
        clip: Search the range of each group that has the least squared rounding error; else from the smallest to the largest weight.
    """

    name = "spqr"
    accepts = DENSE
    citation = Citation("SpQR", year=2023, arxiv="2306.03078")
    needs = Needs(calibration=True)
    produces = "packed"

    group_size: Literal[32, 64] = 32
    symmetric: bool = True
    clip: bool = True

    @property
    def weight_grid(self) -> str:
        return uniform_grid(self.symmetric, "searched" if self.clip else "min-max")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.formats import packed
        from slimbench.methods.quantization.grids.outliers import quantize
        from slimbench.methods.quantization.solvers.blockwise import Tally, quantize_blocks

        calibration = check_calibration(calibration, dense.shape)
        model = dense.load()
        check_groups(block_linears(model), self.group_size)
        grid, tally = packed.Grid(self.bits, self.group_size), Tally()
        weights = quantize_blocks(
            model,
            calibration.ids,
            lambda _, weight, moments: quantize(weight, moments, grid, self.dampening, self.outlier_fraction, self.symmetric, self.clip),
            dense.progress,
        )
        packed.save(model, tally.count(weights), out)
        details = {"symmetric": self.symmetric} | tally.details()
        return Claim(self.produces, bits=self.bits, group_size=self.group_size, details=details)
