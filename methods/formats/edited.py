"""The artefact format `edited`: a model whose architecture was changed, as the config of its source and the edits that changed it.

The folder holds the `config.json` of the source, `model.safetensors` with the tensors of the edited model, and `edited.json`:

    {"format": "slimbench edited", "schema": 1, "edits": [{"edit": NAME, …}, …]}

The loader makes the source's model without data, makes the edits in their order, and fills it. No code is read: an edit is one of
these, and its module one of `methods.formats.architecture.modules`. Full names of modules and tensors are those before the edit.

    resize        tensor, shape                       a parameter of another size; what a module says of its sizes and heads follows
    bias          module                              a linear layer gets a bias
    factor        module, rank                        a linear layer becomes X.reduce [rank, in] and X.expand [out, rank]
    factor-plus   module, rank, rows                  the same, and X.sparse [rows, in] adds to the outputs X.kept [rows]
    kept          module, side, count                 a linear layer reads the inputs, or makes the outputs (side), X.kept [count] alone
    remove-block  module                              a block is gone; the later ones move up, and so do their places in the cache
    remove-part   module, part: attention | mlp       so is one half of a block with its norm; it adds nothing to the residual connection
    insert        module, as_, kind, place, arguments X.as_ is a linear layer, a norm, a bottleneck adapter or a fusion of several (kind)
                                                      on the inputs or the outputs of X (place: before | after)
    shortcuts     module, attention, mlp              each residual connection of a block gets a matrix [out, in] of that shape:
                                                      h = attention(norm(x)) + attention_shortcut(x)
                                                      y = mlp(norm(h)) + mlp_shortcut(h)
    vocabulary    kept                                embedding and head hold `kept` rows; X.rows [vocabulary] names the row of each
                                                      token, -1 for none: read as row 0, never predicted

A model of which only whole blocks are gone is written as an ordinary checkpoint. Any format that stores layers in parts
(`methods.formats.storage`) holds such a base too: `edited.json` then stands beside it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimbench.methods.base import EDITED, ModelShape
from slimbench.methods.formats import storage
from slimbench.methods.formats.architecture import edits
from slimbench.methods.formats.architecture.structure import blocks_of

FORMAT = EDITED
SCHEMA = edits.SCHEMA


def load(folder: Path, device: str = "cpu", trust_remote_code: bool = False, dtype: torch.dtype | None = None) -> Any:
    """Load an edited model in evaluation mode.

    Args:
        dtype: Of the weights; None: as they are stored.

    Raises:
        ValueError: The schema is newer than this program, an edit does not fit, or tensors are missing or left over.
    """
    model = storage.load(folder, device, trust_remote_code=trust_remote_code)
    if dtype is not None and dtype is not model.dtype:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
    return model


def shape_of(folder: Path) -> ModelShape:
    """The sizes that the edits left."""
    model = storage.skeleton(folder)
    shape = ModelShape.from_config(json.loads((folder / "config.json").read_text()))
    layers = [layer for block in blocks_of(model).values() for layer in block.modules() if isinstance(layer, nn.Linear)]
    return replace(
        shape,
        hidden_size=model.get_input_embeddings().embedding_dim,
        num_layers=model.config.num_hidden_layers,
        widths=tuple(sorted({layer.in_features for layer in layers})),
    )
