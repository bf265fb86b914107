"""The codebook format against its definition, written out here weight by weight in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.methods.base import DenseModel
from slimbench.methods.formats import codebook
from slimbench.methods.formats.codebook import CodebookLinear, CodebookWeight
from slimbench.methods.kernels.grid import PLANES, Outliers, pack, unpack
from tests.support import tiny

OUT, IN = 16, 64
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"))


def random_weight(
    bits: int, out: int = OUT, width: int = IN, books: int = 1, tables: int = 1, dim: int = 1, dtype: torch.dtype = BF16, **more: Any
) -> CodebookWeight:
    shape = (books, out // dim, width) if more.get("along") == "out" else (books, out, width // dim)
    codes = torch.randint(0, 2**bits, shape)
    table = torch.randn(books, tables, 2**bits, dim).to(dtype)
    return CodebookWeight.of(codes.to(torch.uint8 if bits <= 8 else torch.int32), table, bits, dtype, **more)


def exact(weight: CodebookWeight) -> Tensor:
    """The definition, one weight after the other, in float64."""
    out, width = weight.shape
    codes = weight.indices()
    dim, result = weight.codebook.shape[3], torch.zeros(out, width, dtype=torch.float64)
    for o in range(out):
        for i in range(width):
            for k in range(len(weight.codes)):
                row, column, place = (o, i // dim, i % dim) if weight.along == "in" else (o // dim, i, o % dim)
                tables = weight.codebook[k if len(weight.codebook) > 1 else 0]
                level = tables[o if len(tables) > 1 else 0, int(codes[k, row, column]), place].double()
                if weight.scales is not None:
                    scales = weight.scales[k if len(weight.scales) > 1 else 0]
                    level = level * scales[o, i * scales.shape[1] // width].double()
                result[o, i] += level if weight.tensor_scale is None else level * weight.tensor_scale.double()
            if weight.offsets is not None:
                result[o, i] += weight.offsets[o, i * weight.offsets.shape[1] // width].double()
            if weight.column_scales is not None and weight.column_offsets is not None:
                result[o, i] = result[o, i] * weight.column_scales[i].double() + weight.column_offsets[i].double()
    if weight.outliers is not None:
        for o in range(out):
            for n in range(int(weight.outliers.starts[o]), int(weight.outliers.starts[o + 1])):
                result[o, int(weight.outliers.columns[n])] = weight.outliers.values[n].double()
    return result


def outliers() -> Outliers:
    return Outliers.of(10 * torch.randn(OUT, IN).to(BF16), torch.rand(OUT, IN) < 0.03)


def kinds() -> dict[str, CodebookWeight]:
    torch.manual_seed(1)
    scales = torch.rand(1, OUT, IN // 16) + 0.5
    return {
        "4 bits, one table": random_weight(4),
        "3 bits, a table a row": random_weight(3, tables=OUT),
        "2 bits, scales": random_weight(2, scales=scales.to(BF16)),
        "8 bits, float32 scales": random_weight(8, scales=scales, dtype=torch.float32),
        "e8m0 scales": random_weight(4, scales=scales.to(torch.float8_e8m0fnu)),
        "e4m3 and tensor scale": random_weight(4, scales=scales.to(torch.float8_e4m3fn), tensor_scale=torch.tensor(0.37)),
        "binary, scales and offsets": CodebookWeight.of(
            torch.randint(0, 2, (3, OUT, IN), dtype=torch.uint8),
            torch.tensor([-1.0, 1.0]).to(BF16).view(1, 1, 2, 1),
            1,
            BF16,
            scales=torch.rand(3, OUT, IN // 32).to(BF16),
            offsets=torch.randn(OUT, IN // 32).to(BF16),
        ),
        "vectors": random_weight(8, dim=4),
        "vectors along the outputs": random_weight(8, dim=4, along="out"),
        "12 bits, additive vectors": random_weight(12, books=2, dim=8, width=128),
        "16 bits along the outputs": random_weight(16, dim=2, along="out"),
        "outliers": random_weight(3, tables=OUT, outliers=outliers()),
        "normalised columns": random_weight(
            8, dim=4, along="out", column_scales=torch.rand(IN).to(BF16), column_offsets=torch.randn(IN).to(BF16)
        ),
        "scales and normalised columns": random_weight(
            4, scales=scales.to(BF16), column_scales=torch.rand(IN).to(BF16), column_offsets=torch.randn(IN).to(BF16)
        ),
    }


@pytest.mark.parametrize("kind", kinds())
def test_dequantized_weight_is_its_definition(kind: str) -> None:
    weight = kinds()[kind]
    got, want = weight.dequantize(), exact(weight)
    assert got.dtype is weight.dtype and got.shape == weight.shape
    assert torch.allclose(got.double(), want, rtol=2**-8 if got.dtype is BF16 else 1e-6, atol=1e-6)
    single = len(weight.codes) == 1 and weight.scales is None and weight.offsets is None and weight.column_scales is None
    assert not single or torch.equal(got, want.to(got.dtype))
    if weight.outliers is not None:
        assert torch.equal(got[weight.outliers.rows, weight.outliers.columns.long()], weight.outliers.values)


@pytest.mark.parametrize("bits", PLANES)
def test_packed_codes_come_back(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 40)).to(torch.uint8 if bits <= 8 else torch.int32)
    stored = pack(codes, bits)
    assert stored.dtype is torch.uint8 and stored.shape == (5, 40 * bits // 8)
    assert torch.equal(unpack(stored, bits), codes)


@pytest.mark.parametrize("kind", kinds())
def test_parts_take_the_bytes_that_the_format_implies_and_come_back(kind: str) -> None:
    weight = kinds()[kind]
    layer, x = CodebookLinear(weight), torch.randn(2, 3, weight.shape[1]).to(weight.dtype)
    assert torch.equal(layer.dequantize(), weight.dequantize())
    assert torch.equal(layer(x), torch.nn.functional.linear(x, weight.dequantize()))
    held = {name: buffer.nbytes for name, buffer in layer.named_buffers()}
    books, dim = len(weight.codes), weight.codebook.shape[3]
    assert held.pop("codes") == books * weight.shape[0] * weight.shape[1] // dim * weight.bits / 8
    others = (weight.codebook, weight.scales, weight.tensor_scale, weight.offsets, weight.column_scales, weight.column_offsets)
    expected = sum(t.nbytes for t in others if t is not None)
    expected += 4 * (OUT + 1) + (4 + 2) * len(weight.outliers.columns) if weight.outliers else 0
    assert sum(held.values()) == expected


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="not in 5"):
        random_weight(5)
    with pytest.raises(ValueError, match="do not end at a byte"):
        random_weight(3, width=36)
    with pytest.raises(ValueError, match="16 levels do not fit into codes of 3 bits"):
        CodebookWeight.of(torch.zeros(1, 8, 8, dtype=torch.uint8), torch.zeros(1, 1, 16, 1), 3, BF16)


def write(dense: DenseModel, out: Path, **settings: Any) -> tuple[Any, dict[str, CodebookWeight], float]:
    """Random levels in all layers of the tiny model, those of attention with one shared table."""
    from slimbench.methods.core.layers import block_linears

    model = dense.load()
    shared = torch.randn(1, 1, 16, 1).to(BF16) / 8
    weights = {}
    for name, layer in block_linears(model).items():
        weights[name] = random_weight(4, layer.out_features, layer.in_features, scales=torch.rand(1, layer.out_features, 2).to(BF16))
        if "self_attn" in name:
            weights[name] = CodebookWeight.of(weights[name].indices(), shared, 4, BF16)
    return model, weights, codebook.save(model, weights.items(), out)


def test_saved_model_loads_with_the_same_weights(dense: DenseModel, tmp_path: Path) -> None:
    model, weights, bits = write(dense, tmp_path)
    loaded: Any = codebook.load(tmp_path)
    for name, weight in weights.items():
        assert torch.equal(loaded.get_submodule(name).dequantize(), weight.dequantize())
        model.get_submodule(name).weight.data = weight.dequantize()
    ids = tiny.tokens().ids
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(key.startswith("codebooks.") for key in stored) == 1
    tables = {loaded.get_submodule(name).codebook.data_ptr() for name in weights if "self_attn" in name}
    assert len(tables) == 1
    numbers = sum(w.shape[0] * w.shape[1] for w in weights.values())
    linear = sum(t.nbytes for key, t in stored.items() if key.startswith("codebooks.") or key.rpartition(".")[0] in weights)
    assert bits == pytest.approx(8 * linear / numbers, abs=1e-4) and 4 < bits < 5
    assert torch.equal(stored["model.embed_tokens.weight"], model.get_input_embeddings().weight)


def test_evidence_sees_the_bits_and_the_fallback(dense: DenseModel, tmp_path: Path) -> None:
    _, _, bits = write(dense, tmp_path)
    found = TransformersModel(codebook.load(tmp_path), "cpu").evidence()
    assert found.effective_bits == pytest.approx(bits, abs=1e-4)
    assert found.kernel and found.kernel.startswith("dequantize")


def test_head_that_is_replaced_serves_the_tied_embedding(dense: DenseModel, tmp_path: Path) -> None:
    model: Any = dense.load()
    weight = random_weight(4, model.config.vocab_size, model.config.hidden_size)
    codebook.save(model, [("lm_head", weight)], tmp_path)
    loaded: Any = codebook.load(tmp_path)
    model.lm_head.weight.data = model.model.embed_tokens.weight.data = weight.dequantize()
    assert not any("embed_tokens" in key for key in load_file(tmp_path / "model.safetensors"))
    assert torch.equal(loaded(tiny.tokens().ids).logits, model(tiny.tokens().ids).logits)


def test_newer_schema_and_missing_tensors_are_named(dense: DenseModel, tmp_path: Path) -> None:
    write(dense, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing \['model.norm.weight'\]"):
        codebook.load(tmp_path)
    described = json.loads((tmp_path / "codebook.json").read_text())
    (tmp_path / "codebook.json").write_text(json.dumps(described | {"schema": codebook.SCHEMA + 1}))
    with pytest.raises(ValueError, match="newer than"):
        codebook.load(tmp_path)
