"""A budget of bits spread over layers: what each width would cost the model's predictions, and the cheapest choice that fits.

Where the weight of a layer changes by ΔW, its output at token t changes by e_t = ΔW x_t, and the predictions move, to second order, by
a divergence of

    ½ E[(g_t · e_t)²]        g_t: gradient of -log p(y) with respect to the output, y drawn from the model's own predictions

(the Fisher information of the outputs; what different tokens do to each other is left out). So the output error of every width is
measured, and weighed by how much the predictions care about its direction; one backward pass serves all layers and widths.

The choice of widths is a knapsack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimbench.methods.core.budgets import least
from slimbench.methods.core.losses import cross_entropy
from slimbench.methods.kernels.grid import Grid
from slimbench.methods.kernels.rounding import fit_groups, nearest_codes

_BATCH_TOKENS = 1024
_UNITS = 20_000


def divergences(
    model: Any,
    layers: Mapping[str, nn.Linear],
    ids: Tensor,
    grids: Sequence[Grid],
    symmetric: bool,
    progress: Callable[[float, float], None] | None = None,
    seed: int = 0,
    clip: bool = True,
) -> dict[str, list[float]]:
    """Divergence in nats a token that rounding each layer alone would cause, for each grid.

    Args:
        model: In evaluation mode; its weights are not changed.
        ids: Tokens, int64 [samples, length].
        grids: Weights are rounded to nearest.
        seed: Of the predictions that are drawn.
        clip: In searched ranges, see `fit_groups`.
    """
    model.requires_grad_(False)
    fitted = {name: [_fit(layer.weight.detach(), grid, symmetric, clip) for grid in grids] for name, layer in layers.items()}
    sums = {name: torch.zeros(len(grids), dtype=torch.float64) for name in layers}

    def weigh(name: str, x: Tensor, gradient: Tensor) -> None:
        weight, gradient = layers[name].weight.detach(), gradient.flatten(0, -2).float()
        for index, grid in enumerate(grids):
            change = _change(weight, grid, *fitted[name][index]).to(x.dtype)
            error = nn.functional.linear(x.flatten(0, -2), change).float()
            sums[name][index] += 0.5 * float((gradient * error).sum(1).double().square().sum())

    def watch(name: str, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        output.register_hook(partial(weigh, name, args[0].detach()))

    generator = torch.Generator(model.device).manual_seed(seed)
    hooks = [layer.register_forward_hook(partial(watch, name)) for name, layer in layers.items()]
    batches = ids.split(max(1, _BATCH_TOKENS // ids.shape[1]))
    try:
        for done, batch in enumerate(batches):
            embedded = model.get_input_embeddings()(batch.to(model.device)).detach().requires_grad_()
            with torch.enable_grad():
                logits = model(inputs_embeds=embedded, use_cache=False).logits.float().flatten(0, -2)
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
                cross_entropy(logits, drawn, "sum").backward()
            if progress:
                progress(done + 1, len(batches))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / ids.numel()).tolist() for name, total in sums.items()}


def allocate(costs: Sequence[Sequence[float]], sizes: Sequence[int], bits: Sequence[int], average: float) -> list[int]:
    """The index into `bits` for each layer with the least sum of costs, at no more than `average` bits a weight.

    Exact where the sizes have a large common divisor; else bits are counted in units of a 20,000th of the budget, rounded up.

    Args:
        costs: For each layer, the cost of each width.
        sizes: Weights of each layer.

    Raises:
        ValueError: Even the smallest width is above the average.
    """
    budget = average * sum(sizes)
    unit = max(math.gcd(*sizes), math.ceil(budget / _UNITS))
    units = [[math.ceil(size * width / unit) for width in bits] for size in sizes]
    total = math.floor(budget / unit + 1e-9)
    try:
        return least(costs, units, total)
    except ValueError:
        raise ValueError(f"{average:g} bits a weight are fewer than the smallest width, {min(bits)}, needs") from None


def _fit(weight: Tensor, grid: Grid, symmetric: bool, clip: bool) -> tuple[Tensor, Tensor | None]:
    groups = weight.float().unflatten(1, (-1, grid.group_size or weight.shape[1]))
    return fit_groups(groups, grid.bits, weight.dtype, symmetric, clip)


def _change(weight: Tensor, grid: Grid, scales: Tensor, offsets: Tensor | None) -> Tensor:
    """Rounded minus original weight, float32 [out, in]."""
    groups = weight.float().unflatten(1, (-1, grid.group_size or weight.shape[1]))
    rounded = (nearest_codes(groups, scales, offsets, grid).float() - grid.mid) * scales.float().unsqueeze(-1)
    if offsets is not None:
        rounded = rounded + offsets.float().unsqueeze(-1)
    return (rounded - groups).flatten(1)
