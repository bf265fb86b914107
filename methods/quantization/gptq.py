"""GPTQ: round weights column by column, feeding each column's error back through the inverse Hessian."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from methods import _llmcompressor
from methods._common import block_linears, check_groups, zero_fraction
from methods.base import Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs

if TYPE_CHECKING:
    from torch import Tensor, nn

    from methods.kernels.grid import Grid, QuantizedWeight

_PRUNED = 0.05


@dataclass(frozen=True)
class GPTQ(Method):
    """Symmetric groups, weight only; embeddings and output head keep their dtype.

    After pruning: llmcompressor moves pruned weights off zero while it corrects for rounding (in 16 % of the groups of a 2:4
    mask). In every layer that comes in with more than 5 % zeros, those weights are therefore set to code zero again afterwards.

    Attributes:
        bits: Bits of a weight, before scales.
        group_size: Consecutive inputs that share one scale.
        act_order: Treat the inputs with the largest activations first; groups stay consecutive ("static" order).
        dampening: Added to the Hessian's diagonal, as a fraction of its mean.
        block_size: Columns updated at once.
    """

    family: ClassVar[str] = "quantization"
    citation: ClassVar[Citation] = Citation("GPTQ", year=2022, arxiv="2210.17323", covers=("quantization/gptq-optq",))
    reference: ClassVar[str] = "llmcompressor:modifiers.quantization.GPTQModifier"
    needs: ClassVar[Needs] = Needs(calibration=True, extra="quantization", modules=("llmcompressor",))
    produces: ClassVar[str] = "packed"

    bits: Literal[4] = 4
    group_size: Literal[32, 64, 128, 256] = 64
    act_order: bool = True
    dampening: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        _llmcompressor.check_solver(self.dampening, self.block_size)

    def check(self, shape: ModelShape) -> None:
        shape.check_group(self.group_size)

    def compress(self, dense: DenseModel, calibration: Calibration | None, out: Path) -> Claim:
        """Quantize in memory and write the codes packed.

        Raises:
            RuntimeError: The library's weights do not lie on its own grid, so they cannot be packed without loss.
        """
        from methods.kernels import packed

        assert calibration is not None
        model = dense.load()
        layers = block_linears(model)
        check_groups(layers, self.group_size)
        masks = {name: layer.weight == 0 for name, layer in layers.items() if zero_fraction({name: layer}) > _PRUNED}
        modifier = self.modifier()
        _llmcompressor.oneshot(model, modifier, calibration)
        packed.save(model, _codes(layers, packed.Grid(self.bits, self.group_size), masks), out)
        details = {
            "act_order": self.act_order,
            "layers_rounded_without_hessian": len(getattr(modifier, "_rtn_fallback_module_names", [])),
            "layers_with_zeros_kept": len(masks),
        }
        return Claim(self.produces, bits=self.bits, group_size=self.group_size, details=details)

    def modifier(self) -> object:
        """The library's own object for these settings."""
        with _llmcompressor.quiet_imports():
            from llmcompressor.modifiers.quantization import GPTQModifier

        weights = {"num_bits": self.bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": self.group_size}
        return GPTQModifier(
            config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
            ignore=["re:.*lm_head"],
            actorder="static" if self.act_order else None,
            dampening_frac=self.dampening,
            block_size=self.block_size,
        )


def _codes(layers: dict[str, nn.Linear], grid: Grid, masks: dict[str, Tensor]) -> Iterator[tuple[str, QuantizedWeight]]:
    """The codes behind the rounded weights that the library left in the layers."""
    import torch

    from methods.kernels.grid import QuantizedWeight

    half = 2 ** (grid.bits - 1)
    for name, layer in layers.items():
        scales = layer.get_parameter("weight_scale").detach()
        groups = layer.weight.detach().float().unflatten(1, (scales.shape[1], -1))
        codes = (groups / scales.float().unsqueeze(-1)).round().clamp(-half, half - 1).flatten(1) + half
        weight = QuantizedWeight(grid, codes.to(torch.uint8), scales)
        if not torch.equal(weight.dequantize(), layer.weight):
            raise RuntimeError(f"{name}: weights from llmcompressor do not lie on their grid of {grid.bits} bits")
        if name in masks:
            weight.codes.masked_fill_(masks[name].to(weight.codes.device), half)
        yield name, weight
