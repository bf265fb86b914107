"""AWQ: scale up the input features that carry large activations before rounding, and divide what precedes them by the same factors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core import llmcompressor as _llmcompressor
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.layers import block_linears, check_groups
from slimbench.methods.core.settings import Grouped
from slimbench.methods.quantization.grids.codes import check_equal, from_zero_points

if TYPE_CHECKING:
    from torch import nn

    from slimbench.methods.kernels.grid import Grid, QuantizedWeight


@dataclass(frozen=True)
class AWQ(Grouped, Method):
    """Weight only; embeddings and output head keep their dtype.

    For the inputs of q, k and v, of gate and up, and of down, the library tries `candidates` vectors of factors
    s = mean|x|^r / mean|w|^(1 - r), r from 0 to 1, and keeps the one whose rounded layers come closest to the outputs of the dense
    ones. The factors go into the norm or the projection before, so the artefact has no layers of its own for them. What is
    rounded is the scaled weight, to the nearest point; the search for clipping that the paper's code adds is not in the library:
    `awq-clip` has it. Where a query head does not have a key head of its own, o is not scaled.

    Attributes:
        bits: Bits of a weight, before scales.
        candidates: Vectors of factors that are tried for a set of layers, as in the paper's code; the time is proportional to it.
        observer: `mse` shrinks the range of a group where that rounds its scaled weights better, though the library searched the factors
            with whole ranges; None takes it from the smallest to the largest weight.
        symmetric: Centre the grid on zero; None: it has a zero point, as in the paper.
    """

    name = "awq"
    citation = Citation("AWQ", year=2023, arxiv="2306.00978", covers=("quantization/awq",))
    reference = "llmcompressor:modifiers.transform.awq.AWQModifier"
    needs = Needs(calibration=True, extra="quantization", modules=("llmcompressor",))
    produces = "packed"

    bits: Literal[3, 4] = 4
    group_size: Literal[32, 64, 128, 256] = 64
    candidates: int = 20
    observer: Literal["mse"] | None = None
    symmetric: Literal[True] | None = None

    def __post_init__(self) -> None:
        if self.candidates < 3:
            raise ValueError(f"candidates must be at least 3, not {self.candidates}")

    @property
    def weight_grid(self) -> str:
        return uniform_grid(bool(self.symmetric), "searched" if self.observer else "min-max")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        """Scale and round in memory and write the codes packed.

        Raises:
            RuntimeError: The packed weights are not those that the library computes with.
        """
        from slimbench.methods.formats import packed

        model = dense.load()
        layers = block_linears(model)
        check_groups(layers, self.group_size)
        _llmcompressor.oneshot(model, self.modifiers(), calibration, dense.progress)
        packed.save(model, _codes(layers, packed.Grid(self.bits, self.group_size)), out)
        details = {"symmetric": bool(self.symmetric), "observer": self.observer}
        return Claim(self.produces, bits=self.bits, group_size=self.group_size, details=details)

    def modifiers(self) -> list[object]:
        """The library's own objects for these settings: one scales, the other rounds."""
        with _llmcompressor.quiet_imports():
            from llmcompressor.modifiers.quantization import QuantizationModifier
            from llmcompressor.modifiers.transform.awq import AWQModifier

        weights: dict[str, object] = {"num_bits": self.bits, "type": "int", "symmetric": bool(self.symmetric), "strategy": "group"}
        weights |= {"group_size": self.group_size} | ({"observer": self.observer} if self.observer else {})
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        return [AWQModifier(n_grid=self.candidates), QuantizationModifier(config_groups=groups, ignore=["re:.*lm_head"])]


def _codes(layers: dict[str, nn.Linear], grid: Grid) -> Iterator[tuple[str, QuantizedWeight]]:
    """What the library rounds the scaled weights to in each forward pass."""
    import torch
    from compressed_tensors.quantization import forward_quantize
    from compressed_tensors.quantization.lifecycle.forward import quantize

    from slimbench.methods.kernels.grid import QuantizedWeight

    half = 2 ** (grid.bits - 1)
    for name, layer in layers.items():
        scales, zeros = layer.get_parameter("weight_scale").detach(), layer.get_parameter("weight_zero_point").detach()
        arguments = layer.quantization_scheme.weights  # type: ignore[union-attr]
        with torch.no_grad():
            codes = quantize(layer.weight, scales, zeros, arguments, dtype=torch.int8).to(torch.int16) + half
            rounded = forward_quantize(layer, layer.weight, "weight", arguments)
        if arguments.symmetric:  # type: ignore[union-attr]
            weight = QuantizedWeight(grid, codes.to(torch.uint8), scales.to(layer.weight.dtype))
        else:
            weight = from_zero_points(codes, scales, zeros.to(torch.int16) + half, grid, layer.weight.dtype)
        check_equal(name, weight, rounded)
        yield name, weight
