"""Which weights become zero: masks of exactly as many as asked for, patterns, and how many zeros there are.

A mask is boolean and true where a weight goes. Of equal scores the earlier weight goes first, so that a mask is a pure function of the
scores and never has more zeros than were asked for: checkpoints whose weights lie on a grid have many equal magnitudes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import ModelShape, Unsupported

if TYPE_CHECKING:
    from torch import Tensor, nn

_SAMPLE = 1 << 18

Scope = Literal["row", "layer"]
"""Among which weights scores are compared: those of one output, or all of a layer."""


def lowest(scores: Tensor, count: int) -> Tensor:
    """The `count` lowest of all scores, as a mask of their shape.

    Raises:
        ValueError: There are not so many.
    """
    import torch

    flat = scores.flatten()
    if not 0 <= count <= len(flat):
        raise ValueError(f"{count} of {len(flat)} scores were asked for")
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = flat.kthvalue(count).values
    chosen = flat < limit
    ties = (flat == limit).nonzero().squeeze(1)
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen.view_as(scores)


def lowest_of_rows(scores: Tensor, counts: Tensor) -> Tensor:
    """The `counts` [rows] lowest scores of each row, as a mask [rows, n]."""
    import torch

    order = scores.argsort(dim=-1, stable=True)
    first = torch.arange(scores.shape[-1], device=scores.device) < counts.unsqueeze(-1)
    return torch.zeros_like(first.expand_as(scores)).scatter(-1, order, first.expand_as(scores))


def choose(scores: Tensor, zeros: int, scope: Scope = "layer", pattern: str | None = None) -> Tensor:
    """The weights of a layer that go, by their scores [out, in], as a mask.

    Args:
        zeros: How many; with the scope `row` each row loses as many, or one more where they do not divide. A pattern says it itself.
        pattern: `n:m` takes the n lowest of each m consecutive inputs.
    """
    import torch

    if pattern:
        n, m = parse_pattern(pattern)
        runs = scores.reshape(-1, m)
        return lowest_of_rows(runs, torch.full((len(runs),), n, device=scores.device)).view_as(scores)
    if scope == "layer":
        return lowest(scores, zeros)
    steps = torch.arange(len(scores) + 1, device=scores.device) * zeros // len(scores)
    return lowest_of_rows(scores, steps.diff())


def across(scores: Mapping[str, Tensor], zeros: int) -> dict[str, Tensor]:
    """The weights that go among all layers, by one threshold, as masks by layer: one byte a weight, and little more on the way.

    Raises:
        ValueError: There are not so many.
    """
    import torch

    total = sum(values.numel() for values in scores.values())
    if not 0 <= zeros <= total:
        raise ValueError(f"{zeros} of {total} scores were asked for")
    if not zeros:
        return {name: torch.zeros_like(values, dtype=torch.bool) for name, values in scores.items()}
    limit = _smallest([values.flatten() for values in scores.values()], zeros, total)
    masks = {name: (values < limit).contiguous() for name, values in scores.items()}
    left = zeros - sum(int(mask.sum()) for mask in masks.values())
    for name, mask in masks.items():
        ties = (scores[name] == limit).flatten().nonzero().squeeze(1)[:left]
        mask.view(-1)[ties] = True
        left -= len(ties)
    return masks


def _smallest(scores: Sequence[Tensor], place: int, total: int) -> Tensor:
    """The score at a place, counted from 1, among all in rising order; a sample gives two bounds, and only what lies between is sorted."""
    import torch

    low, high = (torch.tensor(bound, dtype=scores[0].dtype, device=scores[0].device) for bound in (float("-inf"), float("inf")))
    if total > 4 * _SAMPLE:
        stride = total // _SAMPLE
        sample = torch.cat([values[::stride] for values in scores]).sort().values
        middle, margin = place / total * len(sample), 5 * len(sample) ** 0.5
        bounds = (sample[max(0, int(middle - margin))], sample[min(len(sample) - 1, int(middle + margin))])
        if sum(int((values < bounds[0]).sum()) for values in scores) < place <= sum(int((values <= bounds[1]).sum()) for values in scores):
            low, high = bounds
    below = sum(int((values < low).sum()) for values in scores)
    inside = torch.cat([values[(values >= low) & (values <= high)] for values in scores])
    return inside.kthvalue(place - below).values


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


def check_runs(layers: Mapping[str, nn.Linear], pattern: str | None) -> None:
    """Raise `Unsupported` unless the runs of a pattern tile the inputs of every layer."""
    for name, layer in layers.items():
        if pattern and layer.in_features % parse_pattern(pattern)[1]:
            raise Unsupported(f"pattern {pattern} does not divide the {layer.in_features} inputs of {name}")
