"""GGUF files of dense and packed Llamas, checked by readers that are not ours: the `gguf` package and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray

from slimbench.harness.engines import gguf_evidence
from slimbench.harness.measure.claims import flags
from slimbench.methods.base import DenseModel, Unsupported
from slimbench.methods.formats import gguf as _gguf
from slimbench.methods.formats import packed
from slimbench.methods.formats.gguf import blocks
from slimbench.methods.kernels.grid import Outliers, QuantizedWeight
from slimbench.methods.kernels.rounding import round_to_grid
from slimbench.methods.pruning.depth.shortgpt import ShortGPT
from slimbench.methods.pruning.unstructured.magnitude import Magnitude
from slimbench.methods.quantization.export.gguf import _types
from slimbench.methods.quantization.weight.rtn import RTN
from tests.support import tiny

NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "down_proj": "ffn_down"}


def made(method: Any, dense: DenseModel, out: Path) -> Path:
    out.mkdir()
    method.compress(dense, None, out)
    return out


def tensors(file: Path) -> dict[str, NDArray[np.float32]]:
    return {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(file).tensors}


def types(file: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in GGUFReader(file).tensors}


def rotated(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of one head in llama.cpp's order: number i of the first half, number i of the second, and so on."""
    halves = [head.chunk(2) for head in rows.chunk(heads)]
    return torch.cat([torch.stack(pair) for first, second in halves for pair in zip(first, second, strict=True)])


def edited(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_the_model_back(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    source = tiny.save_model(tmp_path / "dense", "float32", tie_word_embeddings=tied).load()
    _gguf.from_huggingface(tmp_path / "dense", tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=_gguf.MODEL, dtype=torch.float32)
    ids = tiny.tokens().ids
    torch.testing.assert_close(read(ids).logits, source(ids).logits, rtol=1e-5, atol=1e-5)
    assert read.config.rope_parameters["rope_theta"] == source.config.rope_parameters["rope_theta"]
    assert ("output.weight" in types(tmp_path / _gguf.MODEL)) is not tied


def test_bf16_becomes_f16_and_vectors_f32_but_for_the_tiniest(tmp_path: Path) -> None:
    dense = tiny.save_model(tmp_path / "dense")
    file = _gguf.from_huggingface(dense.path, tmp_path)
    found, weights = types(file), dense.load().state_dict()
    assert {found[name] for name in found if "norm" in name} == {"F32"}
    assert {found[name] for name in found if "norm" not in name} == {"F16"}
    expected = weights["model.layers.1.mlp.down_proj.weight"].float().numpy()
    values = tensors(file)["blk.1.ffn_down.weight"]
    np.testing.assert_allclose(values, expected, rtol=0, atol=2**-25)
    large = np.abs(expected) >= 2**-17
    np.testing.assert_array_equal(values[large], expected[large])


def test_half_stores_float32_in_16_bits(tmp_path: Path) -> None:
    dense = tiny.save_model(tmp_path / "dense", "float32")
    found = types(_gguf.from_huggingface(dense.path, tmp_path, half=True))
    assert found["blk.0.attn_q.weight"] == "F16" and found["output_norm.weight"] == "F32"


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"bits": 4, "group_size": 32}, "Q4_0"),
        ({"bits": 4, "group_size": 64}, "Q4_0"),
        ({"bits": 4, "group_size": None}, "Q4_0"),
        ({"bits": 8, "group_size": None}, "Q8_0"),
        ({"bits": 8, "group_size": 64}, "Q8_0"),
    ],
)
def test_a_packed_model_keeps_every_weight(tmp_path: Path, settings: dict[str, Any], kind: str) -> None:
    dense = tiny.save_model(tmp_path / "dense")
    artefact = made(RTN(**settings), dense, tmp_path / "packed")
    file, model = _gguf.from_packed(artefact, tmp_path), packed.load(artefact)
    found, values = types(file), tensors(file)
    for index, (layer, name) in enumerate(NAMES.items()):
        module = dense.load().model.layers[index % 2]
        owner = "mlp" if layer == "down_proj" else "self_attn"
        weight = round_to_grid(getattr(getattr(module, owner), layer).weight.detach(), packed.Grid(**settings))
        groups = (weight.codes.float() - weight.grid.mid).unflatten(1, (weight.scales.shape[1], -1))
        expected = (groups * weight.scales.float()[..., None]).flatten(1)
        if layer in ("q_proj", "k_proj"):
            expected = rotated(expected, 4 if layer == "q_proj" else 2)
        key = f"blk.{index % 2}.{name}.weight"
        assert found[key] == kind
        np.testing.assert_array_equal(values[key], expected.numpy())
    assert found["token_embd.weight"] == "F16" and "output.weight" not in found
    embedding = model.get_input_embeddings().weight.detach().float().numpy()
    np.testing.assert_allclose(values["token_embd.weight"], embedding, rtol=0, atol=2**-25)


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_head_stands_where_it_is_looked_up(tmp_path: Path, tied: bool) -> None:
    dense = tiny.save_model(tmp_path / "dense", tie_word_embeddings=tied)
    found = types(_gguf.from_packed(made(RTN(head_bits=8), dense, tmp_path / "packed"), tmp_path))
    if tied:
        assert found["token_embd.weight"] == "Q8_0" and "output.weight" not in found
    else:
        assert found["token_embd.weight"] == "F16" and found["output.weight"] == "Q8_0"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 2, "group_size": 64}, "there is none for 2 bits"),
        ({"bits": 4, "group_size": 64, "symmetric": False}, "those with an offset"),
        ({"bits": 8, "group_size": None, "symmetric": False}, "those with an offset"),
    ],
)
def test_a_grid_without_a_block_type_is_unsupported(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    artefact = made(RTN(**settings), tiny.save_model(tmp_path / "dense"), tmp_path / "packed")
    with pytest.raises(Unsupported, match=f"no llama.cpp block type holds model.layers.*without loss: {message}"):
        _gguf.from_packed(artefact, tmp_path)


def test_weights_apart_from_the_grid_are_unsupported() -> None:
    apart = Outliers(torch.zeros(3, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0))
    weight = round_to_grid(torch.randn(2, 64), packed.Grid(4, 64))
    with pytest.raises(Unsupported, match="kept apart"):
        blocks.encode("x", QuantizedWeight(weight.grid, weight.codes, weight.scales, None, apart))


def test_other_numbers_than_integers_are_unsupported() -> None:
    with pytest.raises(Unsupported, match="there is none of e4m3 numbers"):
        blocks.block_type("x", packed.Grid(8, None, None, "e4m3"), 64, symmetric=True, outliers=False)


def test_rows_that_are_no_whole_blocks_are_unsupported() -> None:
    with pytest.raises(Unsupported, match="groups of 48 inputs do not consist of blocks of 32"):
        blocks.encode("x", round_to_grid(torch.randn(2, 48), packed.Grid(8, None)))


@pytest.mark.parametrize("size", [1e8, 1e-7])
def test_scales_beyond_float16_are_unsupported(size: float) -> None:
    weight = round_to_grid((torch.randn(4, 64) * size).bfloat16(), packed.Grid(8, None))
    with pytest.raises(Unsupported, match="float16 does not hold its scales"):
        blocks.encode("x", weight)


def test_float32_scales_are_rounded_to_float16_at_most() -> None:
    weight = round_to_grid(torch.randn(8, 64), packed.Grid(4, 32))
    found = dequantize(blocks.encode("x", weight), blocks.block_type("x", weight.grid, 64, True, False))
    np.testing.assert_allclose(found, weight.dequantize().numpy(), rtol=2**-11)
    assert not np.array_equal(found, weight.dequantize().numpy())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "opt"}, "writes the model types llama and mistral, not opt"),
        ({"quantization_config": {"quant_method": "x"}}, "another library's quantization"),
        ({"hidden_act": "gelu"}, "no Llama with the activation gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rotary positions of type yarn"),
        ({"num_hidden_layers": 1}, "no place for the tensor model.layers.1"),
    ],
)
def test_what_llama_cpp_does_not_know_is_unsupported(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    tiny.save_model(tmp_path / "dense")
    with pytest.raises(Unsupported, match=message):
        _gguf.from_huggingface(edited(tmp_path / "dense", **changes), tmp_path)


def test_a_weight_beyond_float16_is_unsupported(tmp_path: Path) -> None:
    dense = tiny.save_model(tmp_path / "dense")
    model = dense.load()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    model.save_pretrained(tmp_path / "large")
    with pytest.raises(Unsupported, match="has values that float16 does not hold"):
        _gguf.from_huggingface(tmp_path / "large", tmp_path)


def test_long_contexts_of_llama_3_1_get_its_factors(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    dense = tiny.save_model(tmp_path / "dense", hidden_size=512, rope_parameters=rope)
    plain = 1 / 5e5 ** (torch.arange(0, 128, 2) / 128)
    expected = plain / dense.load().model.rotary_emb.inv_freq
    found = tensors(_gguf.from_huggingface(dense.path, tmp_path))["rope_freqs.weight"]
    assert expected.min() == 1 and expected.max() == 8 and ((expected > 1.01) & (expected < 7.9)).any()
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)


def test_evidence_tells_roles_bits_and_zeros(tmp_path: Path) -> None:
    dense = tiny.save_model(tmp_path / "dense", tie_word_embeddings=False)
    pruned = made(Magnitude(sparsity=0.5, pattern="2:4"), dense, tmp_path / "pruned")
    again = tiny.dense_model(pruned)
    evidence = gguf_evidence.read(_gguf.from_packed(made(RTN(group_size=64), again, tmp_path / "packed"), tmp_path))
    layers = {layer.role: layer for layer in evidence.layers}
    assert evidence.effective_bits == 4.5 and evidence.kernel == "llama.cpp ggml Q4_0"
    assert layers["linear"].bits_per_weight == 4.5 and layers["linear"].compute == {"int8": 14}
    assert layers["linear"].zeros is not None and layers["linear"].zeros >= 0.5 and layers["linear"].pattern == "2:4"
    assert layers["head"].compute == {"float16": 1} and layers["head"].bytes == layers["embedding"].bytes == 256 * 64 * 2
    weights = sum(p.numel() for p in dense.load().parameters())
    assert evidence.parameters == weights and evidence.weight_bytes == sum(layer.bytes for layer in evidence.layers)


@pytest.mark.parametrize("copied", [True, False])
def test_a_copy_of_the_embedding_counts_where_it_is_in_memory(tmp_path: Path, copied: bool) -> None:
    artefact = made(RTN(head_bits=4), tiny.save_model(tmp_path / "dense"), tmp_path / "packed")
    file = _gguf.from_packed(artefact, tmp_path)
    alone = gguf_evidence.read(file)
    size = 256 * 64 * 4.5 / 8
    found = gguf_evidence.read(file, round(alone.weight_bytes + copied * size))
    assert found.weight_bytes == alone.weight_bytes + copied * size and found.parameters == alone.parameters
    assert [layer.bytes for layer in found.layers if layer.role == "head"] == [size] * copied


def test_types_are_counted_inside_and_outside_the_blocks(tmp_path: Path) -> None:
    artefact = made(RTN(head_bits=8), tiny.save_model(tmp_path / "dense"), tmp_path / "packed")
    file = _gguf.from_packed(artefact, tmp_path)
    assert _types(file, True) == {"Q4_0": 14} and _types(file, False) == {"Q8_0": 1}


def test_blocks_that_are_gone_are_counted(tmp_path: Path) -> None:
    dense = tiny.save_model(tmp_path / "dense", num_hidden_layers=4)
    (folder := tmp_path / "artefact").mkdir()
    claim = ShortGPT(blocks=1).compress(dense, tiny.tokens(), folder)
    found = gguf_evidence.read(_gguf.from_huggingface(folder, tmp_path))
    assert claim.layers == found.blocks == 3 and flags(claim, found) == []
