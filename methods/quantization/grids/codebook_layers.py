"""From the layers of a model to an artefact in the codebook format, for every method that writes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Claim, DenseModel
from slimbench.methods.core.layers import block_linears, check_groups

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from slimbench.methods.formats.codebook import CodebookWeight

FORMAT = "codebook"


def compress_layers(
    dense: DenseModel,
    out: Path,
    encode: Callable[[str, Tensor], CodebookWeight],
    bits: float,
    group_size: int | None = None,
    model: PreTrainedModel | None = None,
    details: dict[str, Any] | None = None,
) -> Claim:
    """Encode the weights of the linear layers inside the blocks, one at a time, and write the artefact.

    Args:
        encode: Makes a weight [out, in] of the model's dtype, with the name of its layer, into indices and tables.
        bits: Of an index for each weight, before tables and scales.
        group_size: Inputs that share a scale, as claimed; layers must be tiled by it.
        model: The dense model, where the caller has loaded it already.
        details: What else to claim; read after the last layer.
    """
    from slimbench.methods.formats import codebook

    model = model or dense.load()
    layers = block_linears(model)
    check_groups(layers, group_size)

    def weights() -> Iterator[tuple[str, CodebookWeight]]:
        for done, (name, layer) in enumerate(layers.items()):
            yield name, encode(name, layer.weight.detach())
            dense.progress(done + 1, len(layers))

    stored = codebook.save(model, weights(), out)
    return Claim(FORMAT, bits=bits, group_size=group_size, details={"stored_bits": stored} | (details or {}))
