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

from methods.base import Unsupported

if TYPE_CHECKING:
    from torch import Tensor

    from methods.kernels.grid import Grid

_REFUSED = {"offsets": "offsets that are no whole steps of the grid", "outlier_values": "outliers", "low_rank_in": "a low-rank part"}
_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # by vLLM into one layer
_HEAD, _EMBEDDING = "lm_head", "model.embed_tokens"


def existing(artefact: Path, out: Path) -> Path:
    """The folder of an artefact that vLLM reads as it is; nothing is written."""
    return artefact


def from_packed(artefact: Path, out: Path) -> Path:
    """Write a `packed` artefact (see `methods.kernels.packed`) without changing one weight.

    Raises:
        Unsupported: The format does not hold a layer's grid, the packed head is the embedding too, or layers that vLLM joins differ.
    """
    from safetensors.torch import load_file, save_file

    from methods.kernels import packed
    from methods.kernels.grid import Grid

    tensors = load_file(artefact / packed.WEIGHTS)
    described = json.loads((artefact / packed.DESCRIPTION).read_text())
    names = sorted(key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight"))
    if _HEAD in names and f"{_EMBEDDING}.weight" not in tensors:
        raise Unsupported("the format compressed-tensors has no packed head that is the embedding too")
    members: dict[Grid, list[str]] = defaultdict(list)
    grids = {name: Grid(**described["layers"].get(name, described["default"])) for name in names}
    _check_joined(grids)
    for name, grid in grids.items():
        for part, reason in _REFUSED.items():
            if f"{name}.{part}" in tensors:
                raise Unsupported(f"the format compressed-tensors does not hold {name}: it has {reason}")
        members[grid].append(name)
        tensors |= dict(_layer(name, grid, tensors.pop(f"{name}.qweight"), tensors.pop(f"{name}.scales")))
    save_file(tensors, out / packed.WEIGHTS, metadata={"format": "pt"})
    config = json.loads((artefact / "config.json").read_text())
    config["quantization_config"] = _description(members, [key for key in tensors if key.endswith(".weight")])
    (out / "config.json").write_text(json.dumps(config, indent=1))
    return out


def _check_joined(grids: dict[str, Grid]) -> None:
    for name in grids:
        parent, _, leaf = name.rpartition(".")
        for parts in _JOINED:
            if leaf == parts[0] and len({grids.get(f"{parent}.{part}") for part in parts}) > 1:
                raise Unsupported(f"vLLM joins {', '.join(parts)} into one layer, and their grids differ in {parent}")


def _layer(name: str, grid: Grid, qweight: Tensor, scales: Tensor) -> Iterator[tuple[str, Tensor]]:
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    from methods.kernels.grid import unpack

    codes = unpack(qweight, grid.bits)
    if grid.activation_bits:
        yield f"{name}.weight", codes.contiguous()
    else:
        signed = (codes.short() - grid.mid).to(torch.int8)
        yield f"{name}.weight_packed", pack_to_int32(signed, grid.bits)
        yield f"{name}.weight_shape", torch.tensor(codes.shape)
    yield f"{name}.weight_scale", scales.contiguous()


def _description(members: dict[Grid, list[str]], dense: list[str]) -> dict[str, Any]:
    groups = {f"group_{index}": _scheme(grid) | {"targets": names} for index, (grid, names) in enumerate(members.items())}
    packed = {name for names in members.values() for name in names}
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": sorted({_HEAD, *(key.removesuffix(".weight") for key in dense)} - packed),
    }


def _scheme(grid: Grid) -> dict[str, Any]:
    common = {"type": "int", "symmetric": True}
    weights = common | {
        "num_bits": grid.bits,
        "strategy": "group" if grid.group_size else "channel",
        "group_size": grid.group_size,
        "dynamic": False,
    }
    if not grid.activation_bits:
        return {"format": "pack-quantized", "weights": weights, "input_activations": None}
    inputs = common | {"num_bits": grid.activation_bits, "strategy": "token", "dynamic": True}
    return {"format": "int-quantized", "weights": weights, "input_activations": inputs}
