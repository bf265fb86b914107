"""The artefact format `adapters`: a quantized base, and low-rank adapters that stay beside it.

    y = x wᵀ + (x inᵀ) outᵀ + b        w on its grid, in [rank, inputs], out [outputs, rank]

The folder holds the base as its own format has it (`packed`: `methods.kernels.packed`; `bitsandbytes`: what transformers saved), and

    adapters.safetensors   X.low_rank_in, X.low_rank_out in the model's dtype, a scaling factor multiplied into the latter
    adapters.json          schema and kind of the base

Adapters become buffers of the layer itself, so that its bytes and its bits include them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from methods.kernels import packed
from methods.kernels.packed_linear import PackedLinear

FORMAT = "adapters"
SCHEMA = 1
DESCRIPTION = "adapters.json"
TENSORS = "adapters.safetensors"
_PARTS = ("low_rank_in", "low_rank_out")

Base = Literal["packed", "bitsandbytes"]


@dataclass(frozen=True)
class Adapter:
    """A low-rank product beside a weight: [rank, in] and [out, rank], in the model's dtype."""

    low_rank_in: Tensor
    low_rank_out: Tensor

    @property
    def nbytes(self) -> int:
        return self.low_rank_in.nbytes + self.low_rank_out.nbytes

    def product(self) -> Tensor:
        """What it adds to the weight, float32 [out, in]."""
        return self.low_rank_out.float() @ self.low_rank_in.float()


class _Adapted(nn.Module):
    """Mixed into the class of a base layer: adds the adapter to its outputs."""

    low_rank_in: Tensor
    low_rank_out: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Inputs [..., in] of the model's dtype; the result is [..., out]."""
        base = super().forward(x)
        return base + nn.functional.linear(nn.functional.linear(x, self.low_rank_in), self.low_rank_out)


class AdaptedPackedLinear(_Adapted, PackedLinear):
    """A packed layer with an adapter."""

    def dequantize(self) -> Tensor:
        """The weights [out, in] that the layer stands for, adapter included."""
        added = Adapter(self.low_rank_in, self.low_rank_out).product()
        return (super().dequantize().float() + added).to(self.dtype)


def save(out: Path, base: Base, adapters: dict[str, Adapter]) -> None:
    """Put adapters, by name of the layer, beside the base that the folder holds already."""
    from safetensors.torch import save_file

    tensors = {f"{name}.{part}": getattr(adapter, part) for name, adapter in adapters.items() for part in _PARTS}
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, out / TENSORS)
    (out / DESCRIPTION).write_text(json.dumps({"format": f"slimbench {FORMAT}", "schema": SCHEMA, "base": base}, indent=1) + "\n")


def load(folder: Path, device: str = "cpu", trust_remote_code: bool = False) -> nn.Module:
    """Load the base in evaluation mode and give its layers their adapters.

    Raises:
        ValueError: The schema is newer than this program, or an adapter does not fit its layer.
    """
    from safetensors.torch import load_file

    described = json.loads((folder / DESCRIPTION).read_text())
    if described["schema"] > SCHEMA:
        raise ValueError(f"adapters schema {described['schema']} is newer than {SCHEMA}; update slimbench")
    model, adapted = _base(folder, described["base"], device, trust_remote_code)
    tensors = load_file(folder / TENSORS, device=device)
    for name in sorted({key.rpartition(".")[0] for key in tensors}):
        layer: Any = model.get_submodule(name)
        adapter = Adapter(*(tensors[f"{name}.{part}"] for part in _PARTS))
        if (adapter.low_rank_out.shape[0], adapter.low_rank_in.shape[1]) != (layer.out_features, layer.in_features):
            raise ValueError(f"{folder.name} has an adapter that does not fit {name}")
        for part in _PARTS:
            layer.register_buffer(part, getattr(adapter, part))
        layer.__class__ = adapted
    return model.requires_grad_(False).eval()


def _base(folder: Path, kind: Base, device: str, trust_remote_code: bool) -> tuple[Any, type[nn.Module]]:
    """The model without its adapters, and the class of its layers with them."""
    if kind == "packed":
        return packed.load(folder, device, trust_remote_code), AdaptedPackedLinear
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", use_safetensors=True, trust_remote_code=trust_remote_code, device_map=device
    )
    return model, type("AdaptedLinear4bit", (_Adapted, Linear4bit), {})


def stored_bits(base_bytes: int, adapters: dict[str, Adapter]) -> float:
    """Bits of a weight with its scales and its adapter.

    Args:
        base_bytes: What the adapted layers take in the base.
    """
    weights = sum(a.low_rank_out.shape[0] * a.low_rank_in.shape[1] for a in adapters.values())
    return 8 * (base_bytes + sum(a.nbytes for a in adapters.values())) / weights


def bytes_of_layers(folder: Path, names: Iterable[str]) -> int:
    """Bytes of the tensors in `model.safetensors` that belong to layers: `X.…`."""
    from safetensors import safe_open

    prefixes = tuple(f"{name}." for name in names)
    with safe_open(folder / packed.WEIGHTS, framework="pt") as file:
        return sum(file.get_tensor(key).nbytes for key in file.keys() if key.startswith(prefixes))  # noqa: SIM118
