"""Pruning through a modifier of llmcompressor, with its zeros counted afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimbench.methods.base import HUGGINGFACE, Calibration, Claim, DenseModel, Unsupported
from slimbench.methods.core import llmcompressor as _llmcompressor
from slimbench.methods.core.layers import block_linears
from slimbench.methods.core.masks import holds_pattern, zero_fraction
from slimbench.methods.formats.huggingface import save_dense

_FEWER, _MORE = 0.01, 0.005  # rows of Wanda round down; equal scores of SparseGPT go together
TARGETS: dict[str, Any] = {"targets": ["Linear"], "ignore": ["re:.*lm_head"]}
"""What a modifier is told to prune: the linear layers of the blocks."""


def prune(
    dense: DenseModel, modifier: Any, calibration: Calibration, sparsity: float, pattern: str | None, out: Path
) -> tuple[Claim, _llmcompressor.Report]:
    """Prune block by block, save with the zeros in place, and check that they are there.

    The library turns experts that lie in one tensor into linear layers.

    Returns:
        The claim, and what the library had to say.

    Raises:
        Unsupported: Checkpoints of the model name their experts otherwise than the library does.
        RuntimeError: The library left fewer zeros than asked for, or more, or broke the pattern.
    """
    model = dense.load()
    _check_names(model)
    report = _llmcompressor.oneshot(model, modifier, calibration, dense.progress)
    layers = block_linears(model)
    zeros = zero_fraction(layers)
    fewer = min(_FEWER, 1 / min(layer.in_features for layer in layers.values()))
    if not sparsity - fewer <= zeros <= sparsity + _MORE:
        raise RuntimeError(f"llmcompressor left {zeros:.2%} zeros where {sparsity:.2%} were asked for")
    if pattern and not all(holds_pattern(layer, pattern) for layer in layers.values()):
        raise RuntimeError(f"llmcompressor broke the pattern {pattern}")
    save_dense(model, out)
    return Claim(HUGGINGFACE, sparsity=zeros, pattern=pattern), report


def _check_names(model: Any) -> None:
    """Raise `Unsupported` where the linear layers that the library makes of experts would not be found again under their names."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    if any(name.endswith("experts.gate_up_proj") for name, _ in model.named_parameters()):
        known = get_checkpoint_conversion_mapping(model.config.model_type) or []
        if not any("gate_proj" in pattern for conversion in known for pattern in conversion.source_patterns):
            raise Unsupported(
                f"checkpoints of {type(model).__name__} name their experts otherwise than llm-compressor, which would write them"
            )
