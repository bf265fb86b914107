"""The packed artefact format: how quantized linear layers lie on disk, and how a model is saved and loaded with them.

The folder holds an ordinary `config.json`, and `model.safetensors` in which each quantized `X.weight` is replaced by

    X.qweight   2, 3 and 4 bits: uint8 [out, in · bits / 8]; a row holds the lower bits of its codes first (4, or 2), then the
                uppermost one of 3 bits; of the codes in one byte, the first has the highest bits
                8 bits: int8 [out, in], codes -128..127, or float8_e4m3fn
    X.scales    model dtype [out, groups], groups = in / group_size, or 1 where a whole row shares its scale
    X.offsets   like the scales; absent on a symmetric grid
    X.outlier_starts, X.outlier_columns, X.outlier_values
                int32 [out + 1], int32 [n], model dtype [n]: added to single weights, by rows; absent where there are none
    X.low_rank_in, X.low_rank_out
                model dtype [rank, in], [out, rank]: their product `out @ in` is added to the matrix; absent where there is none (schema 3)

Every other tensor stays as it was; a tied output head is stored once, under the name of the head where it is packed.
`packed.json` names the schema, the grid of the layers
(`default`) and the layers that differ from it (`layers`). Grids are `bits`, `group_size` (null: one scale a row),
`activation_bits` (8: inputs are rounded, symmetrically, one scale a token; null: inputs keep their dtype) and `number` (`int`, or since
schema 4 `e4m3`: of codes and rounded inputs).

The grid is that of `methods.kernels.grid`; `methods.kernels.packed_linear` says what computes with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from slimbench.methods.formats import storage
from slimbench.methods.kernels.cpu.kernel import OwnCpu
from slimbench.methods.kernels.grid import Grid, LowRank, Outliers, QuantizedWeight, unpack
from slimbench.methods.kernels.packed_linear import PackedEmbedding, PackedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Grid", "LowRank", "Outliers", "PackedLinear", "QuantizedWeight", "load", "save"]

SCHEMA = 4
DESCRIPTION = "packed.json"
WEIGHTS = storage.WEIGHTS


def save(model: PreTrainedModel, weights: Iterable[tuple[str, QuantizedWeight]], out: Path) -> None:
    """Write a model with some of its linear layers packed.

    Args:
        model: Gives the config and every tensor that is not packed.
        weights: Names of `nn.Linear` layers with their weights; consumed one at a time.
        out: Folder to write into.
    """
    grids: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for name, weight in weights:
        grids[name] = asdict(weight.grid)
        parts = {"qweight": weight.packed_codes(), "scales": weight.scales, "offsets": weight.offsets}
        if weight.outliers is not None:
            parts |= weight.outliers.parts()
        if weight.low_rank is not None:
            parts |= weight.low_rank.parts()
        tensors |= {f"{name}.{part}": storage.on_disk(t) for part, t in parts.items() if t is not None}
    storage.save(model, grids, tensors, out)
    storage.describe(out, DESCRIPTION, "packed", SCHEMA, grids, asdict(Grid(8)))


def load(folder: Path, device: str = "cpu", trust_remote_code: bool = False) -> nn.Module:
    """Load a packed artefact in evaluation mode. Dense weights of packed layers are never allocated.

    Raises:
        ValueError: The schema is newer than this program, or tensors are missing or left over.
    """
    layout = storage.described(folder, DESCRIPTION, SCHEMA)

    def build(name: str, parts: dict[str, Tensor]) -> PackedLinear:
        return PackedLinear(weight_of(Grid(**layout(name)), parts), parts.get("bias"))

    model = storage.load(folder, device, "qweight", build, PackedEmbedding, trust_remote_code=trust_remote_code)
    model.graph_pass = graph_pass(model)
    return model


def weight_of(grid: Grid, parts: dict[str, Tensor]) -> QuantizedWeight:
    """The weight of a layer from what is stored of it."""
    apart = Outliers.from_parts(parts), LowRank.from_parts(parts)
    return QuantizedWeight(grid, unpack(parts["qweight"], grid.bits), parts["scales"], parts.get("offsets"), *apart)


def graph_pass(model: nn.Module) -> Any:
    """What a compiling engine should do to the graphs of a packed model; None where none of its layers has a kernel that gains by it."""
    if not any(isinstance(layer, PackedLinear) and layer.kernel == OwnCpu.name for layer in model.modules()):
        return None
    from slimbench.methods.kernels.cpu.share import ShareInputs

    return ShareInputs()
