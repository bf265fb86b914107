"""FineQuant's adaptive granularity: each layer gets the coarsest groups that its weights allow, without data.

The range of a group sets the step of its grid. A layer gets the largest groups, up to a whole row, whose mean range is at most 1 + α times
that of the smallest groups: where single weights or parts of a row would stretch the steps of all others, groups are small, elsewhere
few scales do. The range is what is compared, as the rounding error would not show how the small weights of a row fare: once all of
them are rounded to zero, it hardly grows. That the smallest groups are the measure is a choice made here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.core.layers import block_linears
from slimbench.methods.core.settings import Coded
from slimbench.methods.kernels.rounding import round_to_grid

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slimbench.methods.kernels.grid import QuantizedWeight


@dataclass(frozen=True)
class FineQuant(Coded, Method):
    """Round-to-nearest with groups whose size differs from layer to layer, weight only.

    Attributes:
        bits: Bits of a weight, before scales.
        symmetric: Centre the grid on zero; else fit it to the smallest and largest weight.
        alpha: By which fraction the mean range may exceed that of the smallest groups.
        smallest: Inputs of the smallest groups.
    """

    name = "finequant"
    accepts = DENSE
    citation = Citation("FineQuant", year=2023, arxiv="2308.09723", covers=("quantization/finequant",))
    produces = "packed"

    bits: Literal[2, 3, 4, 8] = 4
    symmetric: bool = True
    alpha: float = 0.2
    smallest: Literal[32, 64, 128, 256] = 32

    @property
    def weight_grid(self) -> str:
        return uniform_grid(self.symmetric)

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ValueError(f"alpha must not be negative, not {self.alpha}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.formats import packed

        model = dense.load()
        sizes: dict[str, int | None] = {}
        layers = block_linears(model)
        packed.save(model, self._weights(layers, sizes, dense), out)
        groups = {name: layer.in_features // (sizes[name] or layer.in_features) for name, layer in layers.items()}
        scales = sum(layer.out_features * groups[name] for name, layer in layers.items())
        weights = sum(layer.weight.numel() for layer in layers.values())
        chosen = Counter(str(size or "row") for size in sizes.values())
        details = {"symmetric": self.symmetric, "layers_by_group_size": dict(chosen), "mean_group_size": weights / scales}
        return Claim(self.produces, bits=self.bits, group_size=max(1, int(weights / scales)), details=details)

    def _weights(
        self, layers: dict[str, nn.Linear], sizes: dict[str, int | None], dense: DenseModel
    ) -> Iterator[tuple[str, QuantizedWeight]]:
        for done, (name, layer) in enumerate(layers.items()):
            weight = self.adapt(layer.weight.detach())
            sizes[name] = weight.grid.group_size
            yield name, weight
            dense.progress(done + 1, len(layers))

    def adapt(self, weight: Tensor) -> QuantizedWeight:
        """The weight [out, in] rounded with the groups that α leads to."""
        from slimbench.methods.kernels.grid import GROUP_SIZES, Grid

        width = weight.shape[1]
        sizes = [size for size in sorted(GROUP_SIZES) if size >= self.smallest and size < width and width % size == 0]
        best, limit = None, (1 + self.alpha) * self._mean_range(weight, sizes[0] if sizes else width)
        for size in (*sizes, width):
            if self._mean_range(weight, size) <= limit:
                best = None if size == width else size
        return round_to_grid(weight, Grid(self.bits, best), self.symmetric)

    def _mean_range(self, weight: Tensor, size: int) -> float:
        """What the grids of groups of a size span, on average."""
        groups = weight.float().unflatten(1, (-1, size))
        span = 2 * groups.abs().amax(-1) if self.symmetric else groups.amax(-1) - groups.amin(-1)
        return float(span.mean())
