"""What the method files share: which layers are compressed, and how a dense result is written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from methods.base import Calibration, ModelShape, Unsupported

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


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


def check_experts(model: PreTrainedModel) -> None:
    """Raise `Unsupported` if the matrices of experts lie in one tensor, where nobody finds them who looks for linear layers."""
    for name, parameter in model.named_parameters():
        if sum(size > 1 for size in parameter.shape) > 2:
            raise Unsupported(f"{name} holds {len(parameter)} experts in one tensor; only linear layers can be handled")


def check_groups(layers: dict[str, nn.Linear], group_size: int | None) -> None:
    """Raise `Unsupported` unless groups tile the inputs of every layer."""
    for name, layer in layers.items():
        if group_size and layer.in_features % group_size:
            raise Unsupported(f"group_size {group_size} does not divide the {layer.in_features} inputs of {name}")


def check_calibration(calibration: Calibration | None, shape: ModelShape) -> Calibration:
    """The calibration tokens, if there are enough of them for second moments of the inputs, and they are those of the model.

    Raises:
        ValueError: There are none, or some are outside the vocabulary.
        Unsupported: There are fewer tokens than a hidden state has features.
    """
    if calibration is None or not calibration.ids.numel():
        raise ValueError("calibration holds no tokens")
    tokens = calibration.ids.numel()
    if tokens < shape.hidden_size:
        raise Unsupported(f"calibration has {tokens} tokens, fewer than the {shape.hidden_size} features of a hidden state")
    if int(calibration.ids.max()) >= shape.vocab_size or int(calibration.ids.min()) < 0:
        raise ValueError(f"calibration has token ids outside the vocabulary of {shape.vocab_size}")
    return calibration


def zero_fraction(layers: dict[str, nn.Linear]) -> float:
    """Exact zeros among the weights of all layers, 0..1."""
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers.values())
    return zeros / sum(layer.weight.numel() for layer in layers.values())


def holds_pattern(layer: nn.Linear, pattern: str) -> bool:
    """Whether each run of m inputs has at least n zeros, for the pattern `n:m`."""
    n, m = parse_pattern(pattern)
    return layer.in_features % m == 0 and bool(((layer.weight == 0).unflatten(1, (-1, m)).sum(-1) >= n).all())


def parse_pattern(pattern: str) -> tuple[int, int]:
    """(n, m) of `n:m`: n zeros in each run of m inputs.

    Raises:
        ValueError: It is no such pattern.
    """
    n, _, m = pattern.partition(":")
    if not (n.isdigit() and m.isdigit() and 0 < int(n) < int(m)):
        raise ValueError(f"pattern must be n:m with 0 < n < m, such as 2:4, not {pattern!r}")
    return int(n), int(m)


def check_sparsity(sparsity: float, pattern: str | None) -> None:
    """Raise `ValueError` unless the sparsity is inside (0, 1) and is the one that the pattern implies."""
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity must be between 0 and 1, both excluded, not {sparsity}")
    if pattern is not None:
        n, m = parse_pattern(pattern)
        if abs(n / m - sparsity) > 1e-9:
            raise ValueError(f"pattern {pattern} means sparsity {n / m:g}, not {sparsity}")


def check_pattern(shape: ModelShape, pattern: str | None) -> None:
    """Raise `Unsupported` unless the runs of a pattern tile the inputs of the layers."""
    for width in (shape.hidden_size, shape.intermediate_size):
        if pattern and width % parse_pattern(pattern)[1]:
            raise Unsupported(f"pattern {pattern} does not divide the input features {width}")


def save_dense(model: PreTrainedModel, out: Path) -> None:
    """Write the model as plain safetensors and a plain config, nothing else.

    The class's own `save_pretrained` is called, since libraries replace it on the instance to write their formats.
    """
    from transformers import PreTrainedModel as Plain

    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    Plain.save_pretrained(model, out)
