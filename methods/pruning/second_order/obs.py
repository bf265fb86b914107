"""Optimal Brain Damage and Optimal Brain Surgeon: what goes is what costs the loss least, to second order.

With F the empirical Fisher matrix of the calibration samples in the place of the Hessian (`fisher`), a weight w_q is as important as

    OBD    ½ F_qq w_q²             (LeCun, Denker and Solla 1989): the others stay as they are
    OBS    w_q² / 2 [F⁻¹]_qq       (Hassibi and Stork 1993): the others make up for it by - w_q / [F⁻¹]_qq · F⁻¹_:q

and one threshold holds for all layers. OBS removes one weight after the other. Here the weights are chosen once, by F⁻¹ with all of
them, and the update is that of removing them one after the other, which for a given mask is the same in whatever order. F is kept in
blocks of consecutive weights of a row; with one block for all weights a single removal is that of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slimbench.methods.base import DENSE, HUGGINGFACE, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.layers import block_linears, check_calibration
from slimbench.methods.core.masks import across, check_sparsity, zero_fraction
from slimbench.methods.formats.huggingface import save_dense


@dataclass(frozen=True, kw_only=True)
class Fisher(Method):
    """A method that asks the gradients of samples which weights matter.

    The artefact holds its zeros in dense storage: it is no smaller, and no faster in dense kernels.

    Attributes:
        sparsity: Fraction of the weights of all layers that becomes zero, above 0 and below 1.
        samples: m: calibration samples whose gradients are taken; all if there are fewer.
    """

    accepts = DENSE
    needs = Needs(calibration=True)

    sparsity: float = 0.5
    samples: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsity(self.sparsity, None)
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, not {self.samples}")


@dataclass(frozen=True, kw_only=True)
class BlockFisher(Fisher):
    """A method that inverts the Fisher matrix in blocks.

    Attributes:
        block_size: B: consecutive weights of a row that are inverted together. Time and memory grow with it.
        dampening: λ: added to the diagonal of the matrix.
    """

    block_size: int = 48
    dampening: float = 1e-7

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {self.block_size}")
        if not self.dampening > 0:
            raise ValueError(f"dampening must be positive, not {self.dampening}")


@dataclass(frozen=True, kw_only=True)
class BrainDamage(Fisher):
    """The diagonal of the Fisher matrix; what remains is not updated. It takes five bytes of memory for each weight of the blocks."""

    name = "obd"
    citation = Citation("Optimal Brain Damage", year=1989, covers=("pruning/obd",))

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.pruning.second_order.fisher import diagonal

        check_calibration(calibration, dense.shape)
        model = dense.load()
        layers = block_linears(model)
        costs = diagonal(model, layers, calibration.ids[: self.samples], dense.progress)
        for name, layer in layers.items():
            costs[name] *= layer.weight.detach().float().square() / 2
        for name, mask in across(costs, round(self.sparsity * sum(cost.numel() for cost in costs.values()))).items():
            layers[name].weight.data.masked_fill_(mask, 0.0)
        save_dense(model, out)
        return Claim(HUGGINGFACE, sparsity=zero_fraction(layers))


@dataclass(frozen=True, kw_only=True)
class BrainSurgeon(BlockFisher):
    """The Fisher matrix in blocks; what remains makes up for what goes."""

    name = "obs"
    citation = Citation("Optimal Brain Surgeon", year=1993)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.pruning.second_order.fisher import Blocks, prune

        check_calibration(calibration, dense.shape)
        model = dense.load()
        layers = block_linears(model)
        prune(model, layers, calibration.ids[: self.samples], self.sparsity, Blocks(self.block_size, self.dampening), dense.progress)
        save_dense(model, out)
        return Claim(HUGGINGFACE, sparsity=zero_fraction(layers))
