"""What the methods do that rotate a model first: its weights are quantized, and its layers rotate and round their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slimbench.methods.base import DenseModel
from slimbench.methods.core.architecture.rotation import set_dtype
from slimbench.methods.core.layers import block_linears
from slimbench.methods.core.second_order import Solver, quantize
from slimbench.methods.formats import runtime
from slimbench.methods.kernels.rounding import round_to_grid
from slimbench.methods.quantization.solvers import blockwise as _blockwise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slimbench.methods.kernels.grid import Grid, QuantizedWeight

Quantizer = Callable[["PreTrainedModel"], Iterator[tuple[str, "QuantizedWeight"]]]
"""The weights of the linear layers of a model by name, quantized one at a time."""


def save(
    model: PreTrainedModel,
    transforms: dict[str, int],
    activations: runtime.ActivationGrid,
    quantizer: Quantizer,
    dense: DenseModel,
    out: Path,
) -> None:
    """Quantize a rotated model and write it as a runtime artefact.

    Args:
        model: In float32; rounded to the dtype of the dense model first.
        transforms: The layers whose inputs go through a Hadamard transform while the model runs, with the size of its blocks.
        activations: How the inputs of all layers of the blocks are rounded.
        quantizer: Sees the transformed inputs, but not their rounding.
    """
    set_dtype(model, getattr(torch, dense.dtype))
    plans = {name: runtime.InputPlan(hadamard=transforms.get(name), grid=activations) for name in block_linears(model)}
    with runtime.planned(model, {name: runtime.InputPlan(hadamard=block) for name, block in transforms.items()}):
        runtime.save(model, out, plans, quantizer(model))


def to_nearest(grid: Grid) -> Quantizer:
    """Rounding to nearest, with a search for the scales of least squared error."""
    return lambda model: ((name, round_to_grid(layer.weight.detach(), grid, clip=True)) for name, layer in block_linears(model).items())


def by_gptq(grid: Grid, solver: Solver, ids: Tensor, dense: DenseModel) -> Quantizer:
    """GPTQ, block by block, on calibration tokens [samples, length]."""
    return lambda model: _blockwise.quantize_blocks(
        model, ids, lambda _, weight, moments: quantize(weight, moments, grid, solver), dense.progress
    )
