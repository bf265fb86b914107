"""Quantization-aware training with torchao: weights are rounded in every forward pass, gradients go straight through.

The library's fake quantizer works with scales in the dtype in which they are stored, so what is trained is what is packed; the codes
are read back from its output, and packing is refused where they do not give it again. Weights only: activations keep their dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.layers import block_linears, check_groups
from slimbench.methods.core.settings import Grouped
from slimbench.methods.core.training import TrainingSettings

if TYPE_CHECKING:
    from slimbench.methods.kernels.grid import Grid, QuantizedWeight


@dataclass(frozen=True)
class TorchAOQAT(TrainingSettings, Grouped, Method):
    """Full-parameter training under symmetric groups; embeddings, norms and head are trained too, but keep their dtype.

    Attributes:
        bits: Bits of a weight, before scales.
    """

    name = "torchao-qat"
    accepts = DENSE
    least_steps = 1000
    citation = Citation(
        "Quantization-aware training", year=2018, arxiv="1712.05877", covers=("quantization/basic-qat-framework-jacob-et-al",)
    )
    reference = "torchao:quantization.qat.QATConfig"
    needs = Needs(calibration=True, training=True, extra="quantization", modules=("torchao",))
    produces = "packed"
    weight_grid = uniform_grid(symmetric=True)

    bits: Literal[2, 3, 4, 8] = 4
    steps: int = 30
    learning_rate: float = 5e-5

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        """Prepare, train, convert.

        Raises:
            RuntimeError: The library's weights do not lie on its own grid, so they cannot be packed without loss.
        """
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig

        from slimbench.methods.formats import packed
        from slimbench.methods.quantization.solvers import qat as _qat

        model: Any = _qat.load_float32(dense)
        names = block_linears(model)
        check_groups(names, self.group_size)
        quantize_(model, self.prepare(dense.dtype), filter_fn=lambda _, name: name in names)
        done = _qat.fit(model, dict(model.named_parameters()), self, calibration.ids, dense)
        grid = packed.Grid(self.bits, self.group_size)
        weights = list(_codes(((name, model.get_submodule(name)) for name in names), grid))
        quantize_(model, QATConfig(step="convert"), filter_fn=lambda _, name: name in names)
        _qat.save_weights(model, weights, dense, out)
        claim = Claim(self.produces, bits=self.bits, group_size=self.group_size, details={"symmetric": True})
        return done.added_to(claim)

    def prepare(self, dtype: str) -> Any:
        """The library's own object for these settings, with scales of a dtype."""
        import torch
        from torchao.quantization import PerAxis, PerGroup
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        weights = IntxFakeQuantizeConfig(
            dtype=getattr(torch, f"int{self.bits}"),
            granularity=PerGroup(self.group_size) if self.group_size else PerAxis(0),
            scale_precision=getattr(torch, dtype),
        )
        return QATConfig(weight_config=weights, step="prepare")


def _codes(layers: Iterable[tuple[str, Any]], grid: Grid) -> Iterator[tuple[str, QuantizedWeight]]:
    """The codes behind the output of the library's fake quantizers."""
    import torch

    from slimbench.methods.kernels.grid import QuantizedWeight

    for name, layer in layers:
        with torch.no_grad():
            wanted = layer.weight_fake_quantizer(layer.weight)
        scales = layer.weight_fake_quantizer.scale
        codes = (wanted.unflatten(1, (scales.shape[1], -1)) / scales.float().unsqueeze(-1)).round().flatten(1) + grid.mid
        weight = QuantizedWeight(grid, codes.to(torch.int8 if grid.bits == 8 else torch.uint8), scales)
        if not torch.equal(weight.dequantize(), wanted.to(scales.dtype)):
            raise RuntimeError(f"{name}: weights from torchao do not lie on their grid of {grid.bits} bits")
        yield name, weight
