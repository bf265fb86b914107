"""Packed models as `compressed-tensors`, read back by transformers: not one weight may differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.methods.base import Unsupported
from slimbench.methods.formats import packed
from slimbench.methods.formats.compressed_tensors import existing, from_packed
from slimbench.methods.quantization.activation.fp8 import FP8Dynamic, FP8Weight
from slimbench.methods.quantization.activation.int8_dynamic import Int8Dynamic
from slimbench.methods.quantization.weight.finequant import FineQuant
from slimbench.methods.quantization.weight.lorc import LoRC
from slimbench.methods.quantization.weight.rtn import RTN
from tests.support import tiny

pytest.importorskip("compressed_tensors", reason="needs the extra `quantization`")


def exported(method: Any, folder: Path) -> tuple[Path, Path]:
    """The packed artefact of a method, and what is written of it."""
    artefact, out = folder / "packed", folder / "exported"
    artefact.mkdir()
    out.mkdir()
    method.compress(tiny.save_model(folder / "dense"), None, artefact)
    return artefact, from_packed(artefact, out)


@pytest.mark.parametrize(
    "method",
    [
        RTN(bits=2, group_size=32),
        RTN(bits=3, group_size=64),
        RTN(bits=4, group_size=32),
        RTN(bits=4, group_size=None),
        RTN(bits=8, group_size=64),
        RTN(bits=8, group_size=None),
        Int8Dynamic(),
        FP8Weight(),
        FP8Dynamic(),
    ],
    ids=lambda m: f"{type(m).__name__}-{getattr(m, 'bits', 8)}-{getattr(m, 'group_size', None)}",
)
def test_transformers_reads_the_same_weights(tmp_path: Path, method: Any) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    artefact, folder = exported(method, tmp_path)
    ours = packed.load(artefact)
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
    compared = 0
    for name, layer in ours.named_modules():
        if isinstance(layer, packed.PackedLinear):
            torch.testing.assert_close(theirs.get_submodule(name).weight, layer.dequantize(), rtol=0, atol=0)
            compared += 1
    assert compared == 14
    assert torch.equal(theirs.get_input_embeddings().weight, ours.get_input_embeddings().weight)


def test_the_description_says_what_is_rounded(tmp_path: Path) -> None:
    _, folder = exported(Int8Dynamic(), tmp_path)
    described = json.loads((folder / "config.json").read_text())["quantization_config"]
    (group,) = described["config_groups"].values()
    assert described["format"] == "int-quantized"
    assert "lm_head" in described["ignore"]
    assert group["input_activations"] == {"type": "int", "symmetric": True, "num_bits": 8, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (RTN(bits=4, group_size=32, symmetric=False), "offsets"),
        (RTN(bits=4, group_size=32, head_bits=4), "no packed head"),
        (LoRC(bits=4, group_size=32), "a low-rank part"),
    ],
)
def test_what_the_format_does_not_hold_is_refused(tmp_path: Path, method: Any, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        exported(method, tmp_path)


def test_layers_that_vllm_joins_must_be_alike(tmp_path: Path) -> None:
    artefact, out = tmp_path / "packed", tmp_path / "out"
    for folder in (artefact, out):
        folder.mkdir()
    FineQuant().compress(tiny.save_model(tmp_path / "dense", hidden_size=128), None, artefact)
    with pytest.raises(Unsupported, match=r"vLLM joins \w+, .*_proj into one layer, and their grids differ"):
        from_packed(artefact, out)


def test_a_dense_folder_is_read_as_it_is(tmp_path: Path) -> None:
    assert existing(tmp_path, tmp_path / "unused") == tmp_path
