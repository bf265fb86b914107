"""The artefact format `adapters`: a base of bitsandbytes in 4 bits, and low-rank adapters that stay beside it.

    y = x wᵀ + (x inᵀ) outᵀ + b        w as bitsandbytes holds it, in [rank, inputs], out [outputs, rank]

The folder holds what transformers saved of the base, and

    adapters.safetensors   X.low_rank_in, X.low_rank_out in the model's dtype, a scaling factor multiplied into the latter
    adapters.json          the schema

Adapters become buffers of the layer itself, so that its bytes and its bits include them. Packed weights have a low-rank part of their
own (`methods.formats.packed`) and need no such format.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from slimbench.methods.formats import huggingface
from slimbench.methods.formats.storage import WEIGHTS
from slimbench.methods.kernels.grid import LowRank

SCHEMA = 1
DESCRIPTION = "adapters.json"
TENSORS = "adapters.safetensors"


class Adapted(nn.Module):
    """Mixed into the class of a base layer: adds the adapter to its outputs."""

    low_rank_in: Tensor
    low_rank_out: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Inputs [..., in] of the model's dtype; the result is [..., out]."""
        base = super().forward(x)
        return base + nn.functional.linear(nn.functional.linear(x, self.low_rank_in), self.low_rank_out)


def save(out: Path, adapters: dict[str, LowRank]) -> None:
    """Put adapters, by name of the layer, beside the base that the folder holds already."""
    from safetensors.torch import save_file

    tensors = {f"{name}.{part}": tensor for name, adapter in adapters.items() for part, tensor in adapter.parts().items()}
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, out / TENSORS)
    (out / DESCRIPTION).write_text(json.dumps({"format": "slimbench adapters", "schema": SCHEMA}, indent=1) + "\n")


def load(folder: Path, device: str = "cpu", trust_remote_code: bool = False) -> nn.Module:
    """Load the base in evaluation mode and give its layers their adapters.

    Raises:
        ValueError: The schema is newer than this program, or an adapter does not fit its layer.
    """
    from bitsandbytes.nn import Linear4bit
    from safetensors.torch import load_file

    schema = json.loads((folder / DESCRIPTION).read_text())["schema"]
    if schema > SCHEMA:
        raise ValueError(f"adapters schema {schema} is newer than {SCHEMA}; update slimbench")
    model = huggingface.load(folder, device, trust_remote_code)
    adapted = type("AdaptedLinear4bit", (Adapted, Linear4bit), {})
    tensors = load_file(folder / TENSORS, device=device)
    for name in sorted({key.rpartition(".")[0] for key in tensors}):
        layer: Any = model.get_submodule(name)
        reduce, expand = (tensors[f"{name}.{part}"] for part in ("low_rank_in", "low_rank_out"))
        if (expand.shape[0], reduce.shape[1]) != (layer.out_features, layer.in_features):
            raise ValueError(f"{folder.name} has an adapter that does not fit {name}")
        for part, tensor in LowRank(reduce, expand).parts().items():
            layer.register_buffer(part, tensor)
        layer.__class__ = adapted
    return model.eval()


def stored_bits(folder: Path, adapters: dict[str, LowRank]) -> float:
    """Bits that the adapted layers take for each weight: what the base in the folder stores of them, and the adapters."""
    from safetensors import safe_open

    prefixes = tuple(f"{name}." for name in adapters)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        stored = sum(file.get_tensor(key).nbytes for key in file.keys() if key.startswith(prefixes))  # noqa: SIM118
    stored += sum(tensor.nbytes for adapter in adapters.values() for tensor in adapter.parts().values())
    return 8 * stored / sum(adapter.expand.shape[0] * adapter.reduce.shape[1] for adapter in adapters.values())
