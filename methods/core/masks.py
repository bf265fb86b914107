"""Patterns of zeros: what they mean, whether layers hold them, how many zeros there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimbench.methods.base import ModelShape, Unsupported

if TYPE_CHECKING:
    from torch import nn


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
