"""Pruning through a modifier of llmcompressor, with its zeros counted afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimbench.methods.base import HUGGINGFACE, Calibration, Claim, DenseModel
from slimbench.methods.core import llmcompressor as _llmcompressor
from slimbench.methods.core.layers import block_linears
from slimbench.methods.core.masks import holds_pattern, zero_fraction
from slimbench.methods.formats.huggingface import save_dense

_TOLERANCE = 0.01
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
        RuntimeError: The library left fewer zeros than asked for, or broke the pattern.
    """
    model = dense.load()
    report = _llmcompressor.oneshot(model, modifier, calibration, dense.progress)
    layers = block_linears(model)
    zeros = zero_fraction(layers)
    if zeros < sparsity - _TOLERANCE:
        raise RuntimeError(f"llmcompressor left {zeros:.1%} zeros where {sparsity:.1%} were asked for")
    if pattern and not all(holds_pattern(layer, pattern) for layer in layers.values()):
        raise RuntimeError(f"llmcompressor broke the pattern {pattern}")
    save_dense(model, out)
    return Claim(HUGGINGFACE, sparsity=zeros, pattern=pattern), report
