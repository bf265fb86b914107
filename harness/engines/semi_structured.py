"""2:4 sparse weights as torch's semi-structured tensors: half of the numbers and their places, multiplied by cuSPARSELt or CUTLASS.

Not yet run on a card.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from slimbench.harness.engines import transformers
from slimbench.methods.base import Unsupported
from slimbench.methods.kernels.grid import two_of_four

_OLDEST = (8, 0)


def load_pretrained(folder: Path, device: str, trust_remote_code: bool = False) -> torch.nn.Module:
    """Load a dense artefact and replace every 2:4 sparse weight of a linear layer; those whose shape the library does not take stay.

    Raises:
        methods.base.Unsupported: The card is too old, or no weight can be replaced.
    """
    from torch.sparse import to_sparse_semi_structured

    if torch.device(device).type != "cuda" or torch.cuda.get_device_capability(device) < _OLDEST:
        raise Unsupported("semi-structured products need a CUDA card of compute capability 8.0")
    module = transformers.load_pretrained(folder, device, trust_remote_code)
    refused = ""
    replaced = 0
    for layer in sparse_layers(module):
        try:
            layer.weight = torch.nn.Parameter(to_sparse_semi_structured(layer.weight.detach()), requires_grad=False)
            replaced += 1
        except RuntimeError as error:
            refused = f": {str(error).splitlines()[0]}"
    if not replaced:
        raise Unsupported(f"no linear layer has a 2:4 sparse weight that torch takes{refused}")
    return module


def sparse_layers(module: Any) -> list[Any]:
    """The linear layers whose weights are 2:4 sparse."""
    layers = [layer for layer in module.modules() if type(layer) is torch.nn.Linear]
    return [layer for layer in layers if two_of_four(layer.weight.detach())]
