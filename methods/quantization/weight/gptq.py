"""GPTQ: round weights column by column, feeding each column's error back through the inverse Hessian."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, Needs, Unsupported
from slimbench.methods.core import llmcompressor as _llmcompressor
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.layers import block_linears, check_calibration, check_groups
from slimbench.methods.core.masks import zero_fraction
from slimbench.methods.core.settings import Coded, Grouped, SecondOrder
from slimbench.methods.quantization.grids.codes import check_equal, from_zero_points

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slimbench.methods.kernels.grid import Grid, QuantizedWeight

_PRUNED = 0.05


@dataclass(frozen=True)
class GPTQ(Coded, Grouped, SecondOrder, Method):
    """Weight only; embeddings and output head keep their dtype.

    The library's asymmetric grid has an integer zero point, so that a weight is `(q - z) * scale`. Its offset `(2^(bits - 1) - z) * scale`
    is rounded to the model's dtype here, which is exact for 2 bits.

    On smollm2-135m at 3 bits the observer "mse" gives perplexity 42.6 (suite quick, 32 × 256 calibration tokens), rounding to
    nearest 141.9.

    After pruning: llmcompressor moves pruned weights off zero while it corrects for rounding (in 16 % of the groups of a 2:4
    mask). In every layer that comes in with more than 5 % zeros, those weights are therefore set to code zero again afterwards. With a
    rounded offset no code is zero, so pruned layers are refused there.

    Attributes:
        bits: Bits of a weight, before scales.
        act_order: Treat the inputs with the largest activations first; groups stay consecutive ("static" order).
        block_size: Columns updated at once.
        observer: `mse` lets the library look for the range of a group that rounds it best; None takes it from the smallest to the
            largest weight.
        asymmetric: Fit the grid to both ends of the range instead of centring it on zero; None: centred.
    """

    name = "gptq"
    accepts = DENSE
    citation = Citation("GPTQ", year=2022, arxiv="2210.17323", covers=("quantization/gptq-optq",))
    reference = "llmcompressor:modifiers.quantization.GPTQModifier"
    needs = Needs(calibration=True, extra="quantization", modules=("llmcompressor",))
    produces = "packed"

    bits: Literal[2, 3, 4, 8] = 4
    act_order: bool = True
    block_size: int = 128
    observer: Literal["mse"] | None = None
    asymmetric: Literal[True] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _llmcompressor.check_block_size(self.block_size)

    @property
    def weight_grid(self) -> str:
        return uniform_grid(not self.asymmetric, "searched" if self.observer else "min-max")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        """Quantize in memory and write the codes packed.

        Raises:
            RuntimeError: The library's weights do not lie on its own grid, so they cannot be packed without loss.
            Unsupported: Pruned weights would not stay zero.
        """
        from slimbench.methods.formats import packed

        calibration = check_calibration(calibration, dense.shape)
        model = dense.load()
        layers = block_linears(model)
        check_groups(layers, self.group_size)
        masks = {name: layer.weight == 0 for name, layer in layers.items() if zero_fraction({name: layer}) > _PRUNED}
        if masks and self.asymmetric and self.bits != 2:
            raise Unsupported(f"pruned weights do not stay zero on a grid of {self.bits} bits with offsets; leave asymmetric at null")
        modifier = self.modifier()
        report = _llmcompressor.oneshot(model, modifier, calibration)
        packed.save(model, _codes(layers, packed.Grid(self.bits, self.group_size), bool(self.asymmetric), masks), out)
        details = {
            "act_order": self.act_order,
            "symmetric": not self.asymmetric,
            "layers_rounded_without_hessian": report.rounded_without_hessian,
            "layers_with_zeros_kept": len(masks),
        }
        return Claim(self.produces, bits=self.bits, group_size=self.group_size, details=details)

    def modifier(self) -> object:
        """The library's own object for these settings."""
        with _llmcompressor.quiet_imports():
            from llmcompressor.modifiers.quantization import GPTQModifier

        weights: dict[str, object] = {"num_bits": self.bits, "type": "int", "symmetric": not self.asymmetric}
        weights |= {"strategy": "group", "group_size": self.group_size} if self.group_size else {"strategy": "channel"}
        if self.observer:
            weights["observer"] = self.observer
        return GPTQModifier(
            config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
            ignore=["re:.*lm_head"],
            actorder="static" if self.act_order else None,
            dampening_frac=self.dampening,
            block_size=self.block_size,
        )


def _codes(layers: dict[str, nn.Linear], grid: Grid, asymmetric: bool, masks: dict[str, Tensor]) -> Iterator[tuple[str, QuantizedWeight]]:
    """The codes behind the rounded weights that the library left in the layers."""
    import torch

    from slimbench.methods.kernels.grid import QuantizedWeight

    half = 2 ** (grid.bits - 1)
    for name, layer in layers.items():
        scales = layer.get_parameter("weight_scale").detach()
        steps = scales.float().unsqueeze(-1)
        zeros = layer.get_parameter("weight_zero_point").detach().float() if asymmetric else torch.zeros_like(scales).float()
        groups = layer.weight.detach().float().unflatten(1, (scales.shape[1], -1))
        codes = ((groups / steps).round() + zeros.unsqueeze(-1)).clamp(-half, half - 1).flatten(1)
        if asymmetric:
            weight = from_zero_points(codes + half, scales, zeros + half, grid, layer.weight.dtype)
            check_equal(name, weight, layer.weight)
        else:
            weight = QuantizedWeight(grid, (codes + grid.mid).to(torch.int8 if grid.bits == 8 else torch.uint8), scales)
        if (not asymmetric or grid.bits == 2) and not torch.equal(weight.dequantize(), layer.weight):
            raise RuntimeError(f"{name}: weights from llmcompressor do not lie on their grid of {grid.bits} bits")
        if name in masks:
            on_zero = (zeros + grid.mid).to(weight.codes.dtype).repeat_interleave(groups.shape[2], dim=1)
            mask = masks[name].to(weight.codes.device)
            weight.codes[mask] = on_zero[mask]
        yield name, weight
