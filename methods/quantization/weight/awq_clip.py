"""AWQ with the clipping of its authors' code: once features are scaled, ranges shrink as far as the outputs of their groups come closer.

For a group g of a row w of scaled weights with its inputs x, and Q the rounding to nearest on a grid that reaches to the largest weight,

    c* = argmin_c Σ_tokens (x_g · (Q(clamp(w_g, -c, c)) - w_g))²,    c = (1 - i/20) max|w_g|,  i = 0 .. 9

(`auto_clip_layer` in github.com/mit-han-lab/llm-awq). The squares are summed there over 512 tokens, here over all, as dᵀ E[x xᵀ] d.
"""

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
from slimbench.methods.kernels.rounding import round_to_grid
from slimbench.methods.quantization.weight.awq import AWQ

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slimbench.methods.core.statistics import Inputs
    from slimbench.methods.kernels.grid import Grid, QuantizedWeight

_STEPS = 20
"""Of the whole range; half of them are tried."""
_UNCLIPPED = ("q_proj", "k_proj", "qkv_proj", "query", "key", "query_key_value", "Wqkv")
"""Their outputs are multiplied with each other, so the error of one of them says little."""


@dataclass(frozen=True)
class AWQClip(Grouped, Method):
    """Weight only; embeddings and output head keep their dtype. Scaled by the library, as `awq` is; q and k are not clipped.

    Attributes:
        bits: Bits of a weight, before scales.
        candidates: As of `awq`.
        symmetric: Centre the grid on zero; None: it has a zero point, as in the paper.
    """

    name = "awq-clip"
    citation = Citation("AWQ", year=2023, arxiv="2306.00978", covers=("quantization/awq",))
    needs = Needs(calibration=True, extra="quantization", modules=("llmcompressor",))
    produces = "packed"

    bits: Literal[3, 4] = 4
    group_size: Literal[32, 64, 128, 256] = 64
    candidates: int = 20
    symmetric: Literal[True] | None = None

    def __post_init__(self) -> None:
        self._scaling()

    @property
    def weight_grid(self) -> str:
        return uniform_grid(bool(self.symmetric), "searched")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        """Scale with the library, clip and round in memory, and write the codes packed."""
        from compressed_tensors.quantization import disable_quantization

        from slimbench.methods.core.statistics import of_model
        from slimbench.methods.formats import packed

        model = dense.load()
        layers = block_linears(model)
        check_groups(layers, self.group_size)
        grid = packed.Grid(self.bits, self.group_size)
        _llmcompressor.oneshot(model, self._scaling().modifiers(), calibration, dense.progress)
        model.apply(disable_quantization)
        weights = self._codes(layers, of_model(model, calibration.ids, dense.progress, gram=True), grid)
        packed.save(model, weights, out)
        return Claim(self.produces, bits=self.bits, group_size=self.group_size, details={"symmetric": bool(self.symmetric)})

    def _scaling(self) -> AWQ:
        return AWQ(bits=self.bits, group_size=self.group_size, candidates=self.candidates, symmetric=self.symmetric)

    def _codes(self, layers: dict[str, nn.Linear], inputs: dict[str, Inputs], grid: Grid) -> Iterator[tuple[str, QuantizedWeight]]:
        symmetric = bool(self.symmetric)
        for name, layer in layers.items():
            weight, gram = layer.weight.detach(), inputs[name].gram
            if not name.endswith(_UNCLIPPED):
                assert gram is not None
                weight = clipped(weight, gram, grid, symmetric)
            yield name, round_to_grid(weight, grid, symmetric)


def clipped(weight: Tensor, gram: Tensor, grid: Grid, symmetric: bool) -> Tensor:
    """A weight matrix [out, in] with each group clamped to where its rounded outputs are closest to its outputs.

    Args:
        gram: Mean of x xᵀ over the inputs of the layer, [in, in], float32.
    """
    import torch

    size = grid.group_size or weight.shape[1]
    groups = weight.float().unflatten(1, (-1, size))
    blocks = torch.stack([gram[at : at + size, at : at + size] for at in range(0, weight.shape[1], size)])
    largest = groups.abs().amax(-1, keepdim=True)
    least, bound = torch.full_like(largest, torch.inf), largest
    for step in range(_STEPS // 2):
        tried = largest * (1 - step / _STEPS)
        cut = torch.clamp(groups, -tried, tried).flatten(1).to(weight.dtype)
        change = round_to_grid(cut, grid, symmetric).dequantize().float().unflatten(1, (-1, size)) - groups
        error = (torch.einsum("ogi,gij->ogj", change, blocks) * change).sum(-1, keepdim=True)
        better = error < least
        least, bound = torch.where(better, error, least), torch.where(better, tried, bound)
    return torch.clamp(groups, -bound, bound).flatten(1).to(weight.dtype)
