"""What the methods that train a quantized model share: the model in float32 with other layers in it, the training, the artefact."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from slimbench.methods.base import DenseModel
from slimbench.methods.core.layers import block_linears, check_groups
from slimbench.methods.core.training import Trained, TrainingSettings, cut, objective, train
from slimbench.methods.quantization.grids.trained_layers import GridLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slimbench.methods.core.training import Loss
    from slimbench.methods.kernels.grid import QuantizedWeight

Layer = TypeVar("Layer", bound=GridLinear)


def load_float32(dense: DenseModel) -> PreTrainedModel:
    """The dense model as it is trained: parameters in float32, without gradients as yet."""
    return dense.load(dtype=torch.float32).requires_grad_(False)


def put_in(model: PreTrainedModel, group_size: int | None, make: Callable[[nn.Linear], Layer]) -> dict[str, Layer]:
    """Replace the linear layers of the blocks and return the new ones by name."""
    layers = block_linears(model)
    check_groups(layers, group_size)
    made = {name: make(layer) for name, layer in layers.items()}
    for name, layer in made.items():
        model.set_submodule(name, layer)
    return made


def fit(
    model: PreTrainedModel,
    parameters: Mapping[str, nn.Parameter],
    settings: TrainingSettings,
    ids: Tensor,
    dense: DenseModel,
    loss: Loss | None = None,
) -> Trained:
    """Train some parameters of a model on tokens [samples, length] by a loss; None: the one that the settings name."""
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return train(settings, parameters, loss or objective(settings, model, dense), cut(ids, settings.length), dense)


def save(model: PreTrainedModel, layers: Mapping[str, GridLinear], dense: DenseModel, out: Path) -> None:
    """Write the trained model packed, everything else in the dtype of the dense model."""
    save_weights(model, [(name, layer.quantized()) for name, layer in layers.items()], dense, out)


def save_weights(model: PreTrainedModel, weights: Iterable[tuple[str, QuantizedWeight]], dense: DenseModel, out: Path) -> None:
    """Write a trained model with weights that are quantized already; everything else in the dtype of the dense model."""
    from slimbench.methods.formats import packed

    dtype = getattr(torch, dense.dtype)
    model.to(dtype)
    model.config.dtype = dtype
    packed.save(model, weights, out)
