"""Low-rank adapters beside a frozen, quantized base, in the dtype of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slimbench.methods.base import DenseModel
from slimbench.methods.core.low_rank import Factors, train_adapters
from slimbench.methods.core.training import Trained, TrainingSettings
from slimbench.methods.kernels.grid import LowRank

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fit(
    model: PreTrainedModel,
    settings: TrainingSettings,
    rank: int,
    alpha: float,
    ids: Tensor,
    dense: DenseModel,
    initial: Mapping[str, Factors] | None = None,
) -> tuple[dict[str, LowRank], Trained]:
    """Train an adapter for each linear layer of the blocks and round it; arguments as of `core.low_rank.train_adapters`.

    Args:
        model: float32, with the dequantized weights of the base.
    """
    made, done = train_adapters(model, settings, rank, alpha, ids, dense, initial)
    dtype = getattr(torch, dense.dtype)
    return {name: LowRank(*(part.to(dtype).contiguous() for part in factors)) for name, factors in made.items()}, done
