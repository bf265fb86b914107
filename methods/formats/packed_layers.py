"""A packed artefact layer by layer, for formats of other programs that hold symmetric grids and nothing beside them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from slimbench.methods.base import Unsupported

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.kernels.grid import Grid

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
_REFUSED = {"offsets": "offsets that are no whole steps of the grid", "outlier_values": "outliers", "low_rank_in": "a low-rank part"}


def check_symmetric(name: str, parts: Collection[str], format_: str) -> None:
    """Raise `Unsupported` for a layer of which more is stored than codes and scales.

    Args:
        parts: What is stored of it.
    """
    for part, reason in _REFUSED.items():
        if part in parts:
            raise Unsupported(f"the format {format_} does not hold {name}: it has {reason}")


class Layer(NamedTuple):
    """A quantized layer: its codes [out, in] (uint8, for 8 bits int8 or float8_e4m3fn) and scales [out, groups]."""

    name: str
    grid: Grid
    codes: Tensor
    scales: Tensor


class PackedModel:
    """A `packed` artefact (see `methods.formats.packed`) whose layers have symmetric grids.

    Args:
        artefact: Its folder.
        format_: What the format that it shall become is called in messages.

    Attributes:
        config: Contents of `config.json`.
        grids: The grid of each packed layer.
        others: All other tensors by name.

    Raises:
        Unsupported: The format does not hold a layer's grid, or the packed head is the embedding too.
    """

    def __init__(self, artefact: Path, format_: str) -> None:
        from safetensors.torch import load_file

        from slimbench.methods.formats import packed
        from slimbench.methods.kernels.grid import Grid

        self.others: dict[str, Tensor] = load_file(artefact / packed.WEIGHTS)
        self.config: dict[str, Any] = json.loads((artefact / "config.json").read_text())
        described = json.loads((artefact / packed.DESCRIPTION).read_text())
        names = sorted(key.removesuffix(".qweight") for key in self.others if key.endswith(".qweight"))
        if HEAD in names and f"{EMBEDDING}.weight" not in self.others:
            raise Unsupported(f"the format {format_} has no packed head that is the embedding too")
        self.grids = {name: Grid(**described["layers"].get(name, described["default"])) for name in names}
        self._stored = {name: [self.others.pop(f"{name}.{part}") for part in ("qweight", "scales")] for name in names}
        for name in names:
            check_symmetric(name, [part for part in _REFUSED if f"{name}.{part}" in self.others], format_)

    def layers(self) -> Iterator[Layer]:
        """The packed layers by name; each can be had once."""
        from slimbench.methods.kernels.grid import unpack

        for name, grid in self.grids.items():
            qweight, scales = self._stored.pop(name)
            yield Layer(name, grid, unpack(qweight, grid.bits), scales)
