"""Packed models as GPTQ checkpoints, read back by the formula of the format: not one weight may differ."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from slimbench.methods.base import Unsupported
from slimbench.methods.formats import packed
from slimbench.methods.formats.gptq_checkpoint import words, write
from slimbench.methods.quantization.activation.fp8 import FP8Weight
from slimbench.methods.quantization.activation.int8_dynamic import Int8Dynamic
from slimbench.methods.quantization.weight.finequant import FineQuant
from slimbench.methods.quantization.weight.lorc import LoRC
from slimbench.methods.quantization.weight.rtn import RTN
from tests.support import tiny


def exported(method: Any, folder: Path, **shape: int) -> tuple[Path, Path]:
    """The packed artefact of a method, and the checkpoint that is written of it."""
    artefact, out = folder / "packed", folder / "exported"
    artefact.mkdir()
    out.mkdir()
    method.compress(tiny.save_model(folder / "dense", **shape), None, artefact)
    write(artefact, out)
    return artefact, out


def codes(stored: Tensor, bits: int, count: int) -> Tensor:
    """int32 [n, columns] → codes [count, columns], one Python integer a column: nothing shared with what wrote them."""
    found = []
    for column in stored.T.tolist():
        stream = sum((word & 0xFFFFFFFF) << 32 * place for place, word in enumerate(column))
        found.append([stream >> bits * place & (1 << bits) - 1 for place in range(count)])
    return torch.tensor(found).T


def rules_of(config: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The grid of a layer by the rules of the config, None where it is left dense."""
    grid: dict[str, Any] | None = {"bits": config["bits"], "group_size": config["group_size"]}
    for rule, change in config.get("dynamic", {}).items():
        if re.match(rule[2:], name):
            grid = None if rule[0] == "-" else change
    return grid


def check(artefact: Path, out: Path) -> int:
    tensors, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())["quantization_config"]
    ours, compared = packed.load(artefact), 0
    for name, layer in ours.named_modules():
        if not isinstance(layer, packed.PackedLinear):
            continue
        grid = rules_of(config, name)
        assert grid and grid["bits"] == layer.grid.bits and grid["group_size"] in (layer.grid.group_size, -1)
        scales, index = tensors[f"{name}.scales"].float(), tensors[f"{name}.g_idx"].long()
        q = codes(tensors[f"{name}.qweight"], grid["bits"], layer.in_features)
        zeros = 1 + codes(tensors[f"{name}.qzeros"].T, grid["bits"], layer.out_features).T
        theirs = ((q - zeros[index]) * scales[index]).T.to(layer.dequantize().dtype)
        torch.testing.assert_close(theirs, layer.dequantize(), rtol=0, atol=0)
        compared += 1
    assert torch.equal(tensors["model.embed_tokens.weight"], ours.get_input_embeddings().weight)
    return compared


@pytest.mark.parametrize(
    "method",
    [
        RTN(bits=2, group_size=32),
        RTN(bits=3, group_size=64),
        RTN(bits=4, group_size=32),
        RTN(bits=4, group_size=None),
        RTN(bits=8, group_size=64),
        RTN(bits=8, group_size=None),
    ],
    ids=lambda m: f"{m.bits}-{m.group_size}",
)
def test_the_checkpoint_holds_the_same_weights(tmp_path: Path, method: RTN) -> None:
    assert check(*exported(method, tmp_path)) == 14


def test_layers_of_other_grids_have_a_rule_of_their_own(tmp_path: Path) -> None:
    artefact, out = exported(FineQuant(), tmp_path, hidden_size=128)
    grids = {layer.grid for layer in packed.load(artefact).modules() if isinstance(layer, packed.PackedLinear)}
    assert len(grids) > 1 and check(artefact, out) == 14


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_hold_any_codes(bits: int) -> None:
    drawn = torch.randint(0, 1 << bits, (5, 96), generator=torch.Generator().manual_seed(bits))
    assert torch.equal(codes(words(drawn, bits).T, bits, 96).T, drawn)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (RTN(bits=4, group_size=32, symmetric=False), "offsets"),
        (RTN(bits=4, group_size=32, head_bits=4), "no packed head"),
        (LoRC(bits=4, group_size=32), "a low-rank part"),
        (Int8Dynamic(), "inputs are rounded to 8 bits"),
        (FP8Weight(), "its codes are e4m3 numbers"),
    ],
)
def test_what_the_format_does_not_hold_is_refused(tmp_path: Path, method: Any, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        exported(method, tmp_path)
