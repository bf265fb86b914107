"""Packed models as folders in the `compressed-tensors` format, from which vLLM chooses its own kernel (Marlin, Machete, …).

Each of the functions named in a config takes the folder of an artefact and a folder for what it writes, and returns the folder to load.
No weight changes: only grids that the format holds exactly are written, which are the symmetric ones without outliers or low-rank parts.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Unsupported
from slimbench.methods.formats.packed_layers import HEAD, Layer, PackedModel

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.kernels.grid import Grid

_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # by vLLM into one layer


def existing(artefact: Path, out: Path) -> Path:
    """The folder of an artefact that vLLM reads as it is; nothing is written."""
    return artefact


def from_packed(artefact: Path, out: Path) -> Path:
    """Write a `packed` artefact (see `methods.formats.packed`) without changing one weight.

    Raises:
        Unsupported: The format does not hold a layer's grid, the packed head is the embedding too, or layers that vLLM joins differ.
    """
    from safetensors.torch import save_file

    from slimbench.methods.formats import packed

    model = PackedModel(artefact, "compressed-tensors")
    _check_joined(model.grids)
    dense = [key for key in model.others if key.endswith(".weight")]
    members: dict[Grid, list[str]] = defaultdict(list)
    for name, grid in model.grids.items():
        members[grid].append(name)
    tensors = model.others | {name: tensor for layer in model.layers() for name, tensor in _layer(layer)}
    save_file(tensors, out / packed.WEIGHTS, metadata={"format": "pt"})
    config = model.config | {"quantization_config": _description(members, dense)}
    (out / "config.json").write_text(json.dumps(config, indent=1))
    return out


def _check_joined(grids: dict[str, Grid]) -> None:
    for name in grids:
        parent, _, leaf = name.rpartition(".")
        for parts in _JOINED:
            if leaf == parts[0] and len({grids.get(f"{parent}.{part}") for part in parts}) > 1:
                raise Unsupported(f"vLLM joins {', '.join(parts)} into one layer, and their grids differ in {parent}")


def _layer(layer: Layer) -> Iterator[tuple[str, Tensor]]:
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    name, grid = layer.name, layer.grid
    if grid.activation_bits or grid.number != "int":
        yield f"{name}.weight", layer.codes.contiguous()
    else:
        signed = (layer.codes.short() - grid.mid).to(torch.int8)
        yield f"{name}.weight_packed", pack_to_int32(signed, grid.bits)
        yield f"{name}.weight_shape", torch.tensor(layer.codes.shape)
    yield f"{name}.weight_scale", layer.scales.contiguous()


def _description(members: dict[Grid, list[str]], dense: list[str]) -> dict[str, Any]:
    groups = {f"group_{index}": _scheme(grid) | {"targets": names} for index, (grid, names) in enumerate(members.items())}
    packed = {name for names in members.values() for name in names}
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": sorted({HEAD, *(key.removesuffix(".weight") for key in dense)} - packed),
    }


def _scheme(grid: Grid) -> dict[str, Any]:
    common = {"type": "int" if grid.number == "int" else "float", "symmetric": True}
    weights = common | {
        "num_bits": grid.bits,
        "strategy": "group" if grid.group_size else "channel",
        "group_size": grid.group_size,
        "dynamic": False,
    }
    if grid.number == "int":
        format_ = "int-quantized" if grid.activation_bits else "pack-quantized"
    else:
        format_ = "float-quantized" if grid.activation_bits else "naive-quantized"
    inputs = common | {"num_bits": grid.activation_bits, "strategy": "token", "dynamic": True} if grid.activation_bits else None
    return {"format": format_, "weights": weights, "input_activations": inputs}
