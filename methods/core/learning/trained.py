"""What methods share that train a model and save it: the model in float32, the loss that the settings name, the artefact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slimbench.methods.base import DenseModel, Unsupported
from slimbench.methods.core.learning.hooks import Hooks
from slimbench.methods.core.learning.teachers import FIRST
from slimbench.methods.core.training import LoopSettings, Trained, cut, objective, train
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.huggingface import save_dense

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(dense: DenseModel) -> PreTrainedModel:
    """The model as it is trained: parameters in float32, four bytes each whether they learn or not, without gradients as yet, and the
    policies in force that lie there.

    Raises:
        Unsupported: The weights below these policies cannot learn.
    """
    acting, base = policies.read(dense.path) if dense.format == policies.FORMAT else ([], dense.format)
    if reason := policies.untrainable(base, {policy.kind: policy for policy in acting}):
        raise Unsupported(reason)
    model = replace(dense, format=base).load(dtype=torch.float32)
    for policy in acting:
        policy.install(model)
    return model.requires_grad_(False)


def fit(
    settings: LoopSettings,
    model: PreTrainedModel,
    parameters: Mapping[str, nn.Parameter],
    ids: Tensor,
    dense: DenseModel,
    hooks: Hooks | None = None,
) -> Trained:
    """Train some parameters of a model, or of what its layers compute, on tokens [samples, length] by the loss that the settings name."""
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return train(settings, parameters, objective(settings, model, dense), cut(ids, settings.length), dense, hooks)


def save(model: PreTrainedModel, dense: DenseModel, out: Path) -> None:
    """Write the model in the dtype that it had, below the policies that it learned with."""
    if dense.format == policies.FORMAT:
        below, learned = policies.base_of(dense), model.state_dict()
        model = below.load()
        model.load_state_dict({name: learned[name] for name in model.state_dict()})
        policies.keep(dense, out)
    dtype = getattr(torch, dense.dtype)
    model.to(dtype)
    model.config.dtype = dtype
    save_dense(model, out)


def teacher(settings: LoopSettings) -> str | None:
    """Whose outputs were learned, in the words of a claim."""
    return FIRST if settings.loss == "distillation" else None
