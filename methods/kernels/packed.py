"""The packed artefact format: how quantized linear layers lie on disk, and how a model is saved and loaded with them.

The folder holds an ordinary `config.json`, and `model.safetensors` in which each quantized `X.weight` is replaced by

    X.qweight   4 bits: uint8 [out, in / 2], codes 0..15; byte j holds input 2j in its high and input 2j + 1 in its low half
                8 bits: int8 [out, in], codes -128..127
    X.scales    model dtype [out, groups], groups = in / group_size, or 1 where a whole row shares its scale
    X.offsets   like the scales; absent on a symmetric grid

Every other tensor stays as it was; a tied output head is stored once. `packed.json` names the schema, the grid of the layers
(`default`) and the layers that differ from it (`layers`). Grids are `bits`, `group_size` (null: one scale a row) and
`activation_bits` (8: inputs are rounded to int8, symmetrically, one scale a token; null: inputs keep their dtype).

The grid is that of `methods.kernels.packed_linear`, which also says what computes with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from methods.kernels.packed_linear import Grid, PackedLinear, QuantizedWeight, unpack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Grid", "PackedLinear", "QuantizedWeight", "load", "save"]

SCHEMA = 1
DESCRIPTION = "packed.json"
WEIGHTS = "model.safetensors"


def save(model: PreTrainedModel, weights: Iterable[tuple[str, QuantizedWeight]], out: Path) -> None:
    """Write a model with some of its linear layers packed.

    Args:
        model: Gives the config and every tensor that is not packed.
        weights: Names of `nn.Linear` layers with their weights; consumed one at a time.
        out: Folder to write into.
    """
    from safetensors.torch import save_file

    grids: dict[str, Grid] = {}
    tensors: dict[str, Tensor] = {}
    for name, weight in weights:
        grids[name] = weight.grid
        parts = {"qweight": weight.packed_codes(), "scales": weight.scales, "offsets": weight.offsets}
        tensors |= {f"{name}.{part}": t.detach().cpu().contiguous() for part, t in parts.items() if t is not None}
    stored: set[int] = set()
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    for key, tensor in sorted(model.state_dict().items(), key=lambda item: item[0] in tied):
        owner, _, leaf = key.rpartition(".")
        if (owner in grids and leaf != "bias") or tensor.data_ptr() in stored:
            continue
        stored.add(tensor.data_ptr())
        tensors[key] = tensor.detach().cpu().contiguous()
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    _dense_config(model).save_pretrained(out)
    (out / DESCRIPTION).write_text(json.dumps(_describe(grids), indent=1) + "\n")


def load(folder: Path, device: str = "cpu", trust_remote_code: bool = False) -> nn.Module:
    """Load a packed artefact in evaluation mode. Dense weights of packed layers are never allocated.

    Raises:
        ValueError: The schema is newer than this program, or tensors are missing or left over.
    """
    from accelerate import init_empty_weights
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    described = json.loads((folder / DESCRIPTION).read_text())
    if described["schema"] > SCHEMA:
        raise ValueError(f"packed schema {described['schema']} is newer than {SCHEMA}; update slimbench")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype, trust_remote_code=trust_remote_code)
    with safe_open(folder / WEIGHTS, framework="pt", device=device) as file:
        keys = set(file.keys())
        for name in sorted(key.removesuffix(".qweight") for key in keys if key.endswith(".qweight")):
            grid = Grid(**described["layers"].get(name, described["default"]))
            parts = {p: file.get_tensor(f"{name}.{p}") for p in ("qweight", "scales", "offsets", "bias") if f"{name}.{p}" in keys}
            keys -= {f"{name}.{part}" for part in parts}
            weight = QuantizedWeight(grid, unpack(parts["qweight"], grid.bits), parts["scales"], parts.get("offsets"))
            model.set_submodule(name, PackedLinear(weight, parts.get("bias")))
        _, unexpected = model.load_state_dict({key: file.get_tensor(key) for key in keys}, strict=False, assign=True)
    model.tie_weights()
    absent = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if absent or unexpected:
        raise ValueError(f"{folder.name} does not fit its config: missing {absent[:3]}, left over {unexpected[:3]}")
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return model.requires_grad_(False).eval()


def _describe(grids: dict[str, Grid]) -> dict[str, Any]:
    default = next(iter(grids.values()), Grid(8))
    differing = {name: asdict(grid) for name, grid in grids.items() if grid != default}
    return {"format": "slimbench packed", "schema": SCHEMA, "default": asdict(default), "layers": differing}


def _dense_config(model: PreTrainedModel) -> Any:
    """The model's config without what a quantization library may have put into it."""
    config = type(model.config).from_dict(model.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config
