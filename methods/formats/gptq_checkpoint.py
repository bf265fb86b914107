"""Packed models as GPTQ checkpoints, which GPTQModel runs by the kernel that it prefers here (Marlin, Machete, ExLlama, int4pack, …).

A checkpoint of that format holds of each layer

    qweight   int32 [in · bits / 32, out]: the codes of an output one after the other, the lowest bits first
    qzeros    int32 [groups, out · bits / 32]: the code of a weight 0, less one
    scales    [groups, out]
    g_idx     int32 [in]: the group of each input

No weight changes: only symmetric grids without outliers or low-rank parts are written.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Unsupported
from slimbench.methods.formats.packed_layers import HEAD, Layer, PackedModel
from slimbench.util import files

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slimbench.methods.kernels.grid import Grid


def load(artefact: Path, device: str, trust_remote_code: bool = False) -> nn.Module:
    """A packed artefact as the module that GPTQModel makes of it.

    Raises:
        Unsupported: The format does not hold it, or GPTQModel has no kernel for it here.
    """
    import torch
    from gptqmodel import GPTQModel

    with files.scratch("gptq") as folder:
        write(artefact, Path(folder))
        try:
            module = GPTQModel.load(folder, device=device, trust_remote_code=trust_remote_code).model.eval()
            with torch.inference_mode():  # a kernel may be chosen that refuses its first product
                module(torch.zeros(1, 1, dtype=torch.int64, device=device))
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (ValueError, NotImplementedError, RuntimeError) as error:
            raise Unsupported(f"GPTQModel does not run this model here: {' '.join(str(error).split())[:200]}") from error
    return module


def write(artefact: Path, out: Path) -> None:
    """Write a `packed` artefact as a GPTQ checkpoint.

    Raises:
        Unsupported: The format does not hold a layer's grid, or the packed head is the embedding too.
    """
    from safetensors.torch import save_file

    from slimbench.methods.formats import packed

    model = PackedModel(artefact, "gptq")
    for name, grid in model.grids.items():
        if grid.number != "int":
            raise Unsupported(f"the format gptq does not hold {name}: its codes are {grid.number} numbers")
        if grid.activation_bits:
            raise Unsupported(f"the format gptq does not hold {name}: its inputs are rounded to {grid.activation_bits} bits")
    dense = [key.removesuffix(".weight") for key in model.others if key.endswith("_proj.weight")]
    tensors = model.others | {name: tensor for layer in model.layers() for name, tensor in _layer(layer)}
    save_file(tensors, out / packed.WEIGHTS, metadata={"format": "pt"})
    described = _description(model.grids, dense)
    (out / "config.json").write_text(json.dumps(model.config | {"quantization_config": described}, indent=1))
    (out / "quantize_config.json").write_text(json.dumps(described, indent=1))
    _placeholder_tokenizer(out)


def _placeholder_tokenizer(out: Path) -> None:
    """A tokenizer of one word: GPTQModel loads none but a whole folder, and nothing here asks it for tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    word = "<unk>"
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({word: 0}, word)), pad_token=word, eos_token=word).save_pretrained(
        out
    )


def _layer(layer: Layer) -> Iterator[tuple[str, Tensor]]:
    import torch

    name, bits, codes, scales = layer.name, layer.grid.bits, layer.codes, layer.scales
    zero = layer.grid.mid or 2 ** (bits - 1)
    unsigned = codes.int() + (zero - layer.grid.mid)
    zeros = torch.full((scales.shape[1], scales.shape[0]), zero - 1, dtype=torch.int32)
    group = codes.shape[1] // scales.shape[1]
    yield f"{name}.qweight", words(unsigned, bits).T.contiguous()
    yield f"{name}.qzeros", words(zeros, bits)
    yield f"{name}.scales", scales.T.contiguous()
    yield f"{name}.g_idx", torch.arange(codes.shape[1], dtype=torch.int32) // group


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, n] of so many bits as int32 [rows, n · bits / 32], one after the other, the lowest bits first."""
    import torch

    stream = (codes.unsqueeze(-1) >> torch.arange(bits, dtype=torch.int32) & 1).flatten(1).unflatten(1, (-1, 32))
    weights = torch.tensor([1 << place for place in range(31)] + [-(1 << 31)], dtype=torch.int64)
    return (stream * weights).sum(-1).to(torch.int32)


def _description(grids: dict[str, Grid], dense: list[str]) -> dict[str, Any]:
    """`quantization_config`: the most frequent grid, and a rule for each layer that has another or none."""
    usual = Counter(grids.values()).most_common(1)[0][0]
    rules = {f"+:^{re.escape(name)}$": _grid(grid) for name, grid in grids.items() if grid != usual}
    rules |= {f"-:^{re.escape(name)}$": {} for name in dense}
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        **_grid(usual),
        "sym": True,
        "desc_act": False,
        "lm_head": HEAD in grids,
        "pack_dtype": "int32",
        **({"dynamic": rules} if rules else {}),
    }


def _grid(grid: Grid) -> dict[str, Any]:
    return {"bits": grid.bits, "group_size": grid.group_size or -1}
