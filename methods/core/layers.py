"""Which layers of a model are compressed, and what calibration must hold for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimbench.methods.base import Calibration, ModelShape, Unsupported

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel
from slimbench.methods.formats.architecture.structure import check_experts


def block_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers inside the decoder blocks by name; embeddings and output head are not among them.

    Raises:
        Unsupported: The model has none, because its blocks are built from other classes, or holds more weights in other classes.
    """
    from torch import nn

    check_experts(model)
    head = model.get_output_embeddings()
    found = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear and layer is not head}
    if not found:
        raise Unsupported(f"{type(model).__name__} has no nn.Linear layers in its blocks")
    return found


def check_groups(layers: dict[str, nn.Linear], group_size: int | None) -> None:
    """Raise `Unsupported` unless groups tile the inputs of every layer."""
    for name, layer in layers.items():
        if group_size and layer.in_features % group_size:
            raise Unsupported(f"group_size {group_size} does not divide the {layer.in_features} inputs of {name}")


def check_calibration(calibration: Calibration, shape: ModelShape) -> Calibration:
    """The calibration tokens, if there are enough of them for second moments of the inputs, and they are those of the model.

    Raises:
        ValueError: There are none, or some are outside the vocabulary.
        Unsupported: There are fewer tokens than a hidden state has features.
    """
    if not calibration.ids.numel():
        raise ValueError("calibration holds no tokens")
    tokens = calibration.ids.numel()
    if tokens < shape.hidden_size:
        raise Unsupported(f"calibration has {tokens} tokens, fewer than the {shape.hidden_size} features of a hidden state")
    if int(calibration.ids.max()) >= shape.vocab_size or int(calibration.ids.min()) < 0:
        raise ValueError(f"calibration has token ids outside the vocabulary of {shape.vocab_size}")
    return calibration
