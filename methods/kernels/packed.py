"""The packed artefact format: how quantized linear layers lie on disk, and how a model is saved and loaded with them.

The folder holds an ordinary `config.json`, and `model.safetensors` in which each quantized `X.weight` is replaced by

    X.qweight   2, 3 and 4 bits: uint8 [out, in · bits / 8]; a row holds the lower bits of its codes first (4, or 2), then the
                uppermost one of 3 bits; of the codes in one byte, the first has the highest bits
                8 bits: int8 [out, in], codes -128..127
    X.scales    model dtype [out, groups], groups = in / group_size, or 1 where a whole row shares its scale
    X.offsets   like the scales; absent on a symmetric grid
    X.outlier_starts, X.outlier_columns, X.outlier_values
                int32 [out + 1], int32 [n], model dtype [n]: added to single weights, by rows; absent where there are none

Every other tensor stays as it was; a tied output head is stored once, under the name of the head where it is packed.
`packed.json` names the schema, the grid of the layers
(`default`) and the layers that differ from it (`layers`). Grids are `bits`, `group_size` (null: one scale a row) and
`activation_bits` (8: inputs are rounded to int8, symmetrically, one scale a token; null: inputs keep their dtype).

The grid is that of `methods.kernels.grid`; `methods.kernels.packed_linear` says what computes with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from methods.kernels.cpu.kernel import OwnCpu
from methods.kernels.grid import Grid, Outliers, QuantizedWeight, unpack
from methods.kernels.packed_linear import PackedEmbedding, PackedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Grid", "Outliers", "PackedLinear", "QuantizedWeight", "load", "save"]

SCHEMA = 2
DESCRIPTION = "packed.json"
WEIGHTS = "model.safetensors"
_PARTS = ("qweight", "scales", "offsets", "outlier_starts", "outlier_columns", "outlier_values", "bias")


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
        if weight.outliers is not None:
            parts |= {f"outlier_{part}": tensor for part, tensor in vars(weight.outliers).items()}
        tensors |= {f"{name}.{part}": t.detach().cpu().contiguous() for part, t in parts.items() if t is not None}
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    stored = {model.get_parameter(f"{name}.weight").data_ptr() for name in grids if f"{name}.weight" in tied}
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
            parts = {part: file.get_tensor(f"{name}.{part}") for part in _PARTS if f"{name}.{part}" in keys}
            keys -= {f"{name}.{part}" for part in parts}
            apart = [parts[f"outlier_{part}"] for part in ("starts", "columns", "values")] if "outlier_values" in parts else None
            codes = unpack(parts["qweight"], grid.bits)
            weight = QuantizedWeight(grid, codes, parts["scales"], parts.get("offsets"), Outliers(*apart) if apart else None)
            model.set_submodule(name, PackedLinear(weight, parts.get("bias")))
        _share_head(model, keys)
        _, unexpected = model.load_state_dict({key: file.get_tensor(key) for key in keys}, strict=False, assign=True)
    if not isinstance(model.get_output_embeddings(), PackedLinear):
        model.tie_weights()
    absent = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if absent or unexpected:
        raise ValueError(f"{folder.name} does not fit its config: missing {absent[:3]}, left over {unexpected[:3]}")
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    model.graph_pass = _graph_pass(model)
    return model.requires_grad_(False).eval()


def _graph_pass(model: nn.Module) -> Any:
    """What a compiling engine should do to the graphs of a packed model; None where none of its layers has a kernel that gains by it."""
    if not any(isinstance(layer, PackedLinear) and layer.kernel == OwnCpu.name for layer in model.modules()):
        return None
    from methods.kernels.cpu.share import ShareInputs

    return ShareInputs()


def _share_head(model: Any, keys: set[str]) -> None:
    """Let the input embedding look up the rows of a packed head, unless it has a weight of its own in the file."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    if isinstance(head, PackedLinear) and f"{name}.weight" not in keys:
        model.set_submodule(name, PackedEmbedding(head))


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
