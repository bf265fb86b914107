"""The engines that export a graph, and the methods that quantize one, against transformers in float32 on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.harness.config import engines as catalogue
from slimbench.harness.config.parse import build_method
from slimbench.harness.config.schema import SpeedPoint, StepConfig
from slimbench.harness.config.sources import shipped_method
from slimbench.harness.config.targets import locate
from slimbench.harness.measure.claims import flags
from slimbench.harness.measure.ledger.measured import ledgers
from slimbench.harness.measure.loaded import LoadedModel
from slimbench.harness.store import artefact
from slimbench.methods.base import Claim, DenseModel, Unsupported
from slimbench.methods.dense import Dense
from slimbench.methods.formats.decoder_graph import read_dense
from slimbench.methods.pruning.depth.shortgpt import ShortGPT
from slimbench.methods.pruning.unstructured.magnitude import Magnitude
from tests.support import tiny

IDS = tiny.tokens(2, 40).ids
STEPS = 8
ENGINES = [
    pytest.param(name, marks=pytest.mark.skipif(bool(catalogue.missing(catalogue.get(name))), reason=f"{name} is not installed"))
    for name in ("openvino", "onnxruntime", "ctranslate2", "openvino-genai")
]
QUANTIZED = [
    ("openvino", "openvino-int8", {}, 8 + 24 / 64, 0.1),
    pytest.param("openvino", "openvino-int8", {"symmetric": True}, 8 + 16 / 64, 0.1, marks=pytest.mark.full),
    ("openvino", "openvino-int4", {"group_size": 32}, 4 + 16 / 32, 0.6),
    ("openvino", "openvino-int4", {"group_size": 32, "symmetric": False}, 4 + 20 / 32, 0.6),
    ("onnxruntime", "onnx-int8", {}, 8 + 40 / 64, 0.1),
    pytest.param("onnxruntime", "onnx-int4", {"group_size": 32}, 4 + 32 / 32, 0.6, marks=pytest.mark.full),
    ("onnxruntime", "onnx-int4", {"group_size": 32, "symmetric": False, "activation_bits": None}, 4 + 36 / 32, 0.6),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes artefacts of a tiny model: `made(method)`, each once."""
    source = tmp_path_factory.mktemp("dense")
    dense = tiny.save_model(source, "float32")
    model = dense.load()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(12 if "proj" in name else 1)
    model.to(torch.bfloat16).save_pretrained(source)
    dense = tiny.dense_model(source, "bfloat16")

    @cache
    def make(method: Any) -> Path:
        out = tmp_path_factory.mktemp("artefact")
        manifest = artefact.Manifest(key="test", model="tiny", pipeline=[], claim=method.compress(dense, None, out))
        artefact.write_manifest(out, manifest)
        return out

    return make


@cache
def load(engine: str, folder: Path) -> LoadedModel:
    config = catalogue.get(engine)
    return locate(config.target)(loaders=config.loaders).load(folder, "cpu")


def shipped(name: str, settings: dict[str, Any]) -> Any:
    raw = shipped_method(name)
    return build_method(StepConfig(name=name, target=raw.pop("_target_"), settings=raw | settings))


@cache
def reference(folder: Path) -> Any:
    return tiny.dense_model(folder, "float32").load()


def wanted(folder: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return reference(folder)(ids).logits


def decoded(model: LoadedModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    step = model.prefill(ids, room=STEPS)
    tokens = [step.token]
    for _ in range(STEPS - 1):
        step = model.decode_step(step)
        tokens.append(step.token)
    return torch.cat(tokens, dim=1)


def in_chunks(model: LoadedModel, sizes: tuple[int, ...]) -> torch.Tensor:
    state, pieces = None, []
    for piece in IDS.split(sizes, dim=1):
        logits, state = model.extend(piece, state)
        pieces.append(logits)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("engine", ENGINES)
def test_dense_equals_transformers(engine: str, made: Callable[..., Path]) -> None:
    folder = made(Dense())
    model, want = load(engine, folder), wanted(folder)
    assert (model.vocab_size, model.max_length, model.device.type) == (256, 256, "cpu")
    whole = model.logits(IDS)
    assert whole.dtype is torch.float32 and (whole - want).abs().max() < 1e-3
    assert (model.logits(IDS[:1], start=31) - want[:1, 31:]).abs().max() < 1e-3
    assert (model.logits(IDS, start=39) - want[:, 39:]).abs().max() < 1e-3
    torch.testing.assert_close(model.logits(IDS), whole)


@pytest.mark.parametrize("engine", ENGINES)
def test_greedy_decoding_equals_transformers(engine: str, made: Callable[..., Path]) -> None:
    folder = made(Dense())
    model, ids = load(engine, folder), IDS
    for _ in range(STEPS):
        ids = torch.cat([ids, wanted(folder, ids)[:, -1:].argmax(-1)], dim=1)
    want = ids[:, IDS.shape[1] :]
    assert len(want.unique()) > 3, "a model that repeats itself proves nothing"
    first = decoded(model)
    assert first.dtype is torch.int64 and torch.equal(first, want)
    assert torch.equal(decoded(model), want), "a second prompt starts with an empty cache"


@pytest.mark.parametrize("engine", ENGINES[:2])
def test_the_cache_gives_the_same_logits(engine: str, made: Callable[..., Path]) -> None:
    model = load(engine, made(Dense()))
    for sizes in ((7, 1, 12, 20), (1, 1, 38)):
        assert (in_chunks(model, sizes) - wanted(made(Dense()))).abs().max() < 1e-3


@pytest.mark.parametrize("engine", ENGINES[:2])
def test_sequences_do_not_share_their_caches(engine: str, made: Callable[..., Path]) -> None:
    model, other = load(engine, made(Dense())), IDS.flip(1)
    (a, one), (b, two) = model.extend(IDS[:, :20]), model.extend(other[:, :20])
    (c, one), (d, _) = model.extend(IDS[:, 20:], one), model.extend(other[:, 20:], two)
    assert (torch.cat([a, c], 1) - wanted(made(Dense()))).abs().max() < 1e-3
    assert (torch.cat([b, d], 1) - wanted(made(Dense()), other)).abs().max() < 1e-3
    assert model.cache_bytes(one) == 2 * 2 * 2 * 2 * 40 * 16 * 4


@pytest.mark.parametrize("shape", [{"attention_bias": True, "tie_word_embeddings": False}, {"head_dim": 32}], ids=str)
@pytest.mark.parametrize("engine", ENGINES[:2])
def test_other_shapes(engine: str, shape: dict[str, Any], tmp_path: Path) -> None:
    dense = tiny.save_model(tmp_path, "float32", seed=1, **shape)
    artefact.write_manifest(tmp_path, artefact.Manifest(key="test", model="tiny", pipeline=[], claim=Claim("huggingface")))
    model = load(engine, dense.path)
    assert (model.logits(IDS) - wanted(tmp_path)).abs().max() < 1e-3
    layers = {layer.role: layer for layer in model.evidence().layers}
    assert layers["linear"].count == 14 and layers["head"].count == 1
    assert (layers["head"].bytes == 0) == (engine == "openvino" and shape.get("tie_word_embeddings", True))


@pytest.mark.parametrize("engine", ENGINES[:1])
def test_openvino_counts_what_its_nodes_take(engine: str, tmp_path: Path) -> None:
    """Parts by kind and by layers, next to nothing of which the step does not take."""
    dense = tiny.save_model(tmp_path, "float32", hidden_size=256, intermediate_size=1024, vocab_size=4096, num_hidden_layers=3)
    artefact.write_manifest(tmp_path, artefact.Manifest(key="test", model="tiny", pipeline=[], claim=Claim("huggingface")))
    model = load(engine, dense.path)
    ((decode, prefill),) = ledgers([model], SpeedPoint(batch=1, prompt=128, new_tokens=17), 12)
    for ledger in (decode, prefill):
        kinds = {part.kind for part in ledger.parts}
        assert {"product", "head", "attention", "elementwise", "python"} <= kinds, ledger
        layers = [set(part.layers) for part in ledger.parts if part.kind == "product"]
        assert set.union(*layers) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        assert sum(part.calls for part in ledger.parts if part.kind == "head") == 1 and "whole microseconds" in str(ledger.unseen)
        counted = sum(part.ms for part in ledger.parts if part.kind != "python")
        assert 0.1 * ledger.step_ms < counted < 2 * ledger.step_ms, "counters slow small nodes, and other tests run beside"


@pytest.mark.parametrize("engine", ENGINES[:2])
def test_dense_evidence(engine: str, made: Callable[..., Path]) -> None:
    found = load.__wrapped__(engine, made(Dense())).evidence()
    bits = {"openvino": 16, "onnxruntime": 32}[engine]
    assert found.effective_bits == bits and found.kernel and found.kernel.startswith(engine) and "undef" not in found.kernel
    layers = {layer.role: layer for layer in found.layers}
    assert layers["linear"].parameters == 73728 and layers["embedding"].parameters == 256 * 64
    assert layers["linear"].compute == {"float32": 14} and layers["linear"].zeros == 0
    assert found.weight_bytes == sum(layer.bytes for layer in found.layers)


@pytest.mark.parametrize("engine", ENGINES)
def test_blocks_that_are_gone_are_counted(engine: str, tmp_path: Path) -> None:
    dense = tiny.save_model(tmp_path / "dense", "float32", num_hidden_layers=4)
    (folder := tmp_path / "artefact").mkdir()
    claim = ShortGPT(blocks=1).compress(dense, tiny.tokens(), folder)
    artefact.write_manifest(folder, artefact.Manifest(key="test", model="tiny", pipeline=[], claim=claim))
    found = load.__wrapped__(engine, folder).evidence()
    assert claim.layers == found.blocks == 3
    assert flags(Claim("huggingface", layers=2), found) == ["claims 2 layers, runs 3"]


@pytest.mark.parametrize("engine", ENGINES[:2])
def test_zeros_are_seen(engine: str, made: Callable[..., Path]) -> None:
    folder = made(Magnitude(sparsity=0.5, pattern="2:4"))
    model, claim = load(engine, folder), artefact.read_manifest(folder).claim
    found = model.evidence()
    assert found.sparsity == pytest.approx(0.5, abs=1e-3)
    assert flags(claim, found) == ["2:4 mask without a sparse kernel"]


@pytest.mark.parametrize(("engine", "method", "settings", "bits", "error"), QUANTIZED)
def test_quantized_graphs(engine: str, method: str, settings: dict[str, Any], bits: float, error: float, made: Callable[..., Path]) -> None:
    made_by = shipped(method, settings)
    if made_by.needs.missing_modules():
        pytest.skip(f"{', '.join(made_by.needs.missing_modules())} is not installed")
    folder, want = made(made_by), wanted(made(Dense()))
    model, claim = load(engine, folder), artefact.read_manifest(folder).claim
    got, found = model.logits(IDS), model.evidence()
    apart = (got - want).norm() / want.norm()
    assert 1e-4 < apart < error
    inputs = 73728 / (2 * (64 + 32 + 32 + 64 + 128 + 128 + 64))  # weights for each row of a layer
    expected = bits if claim.group_size else 8 + (bits - 8) * 64 / inputs
    assert found.effective_bits == pytest.approx(expected, rel=1e-3)
    (linear,) = [layer for layer in found.layers if layer.role == "linear"]
    assert linear.count == 14 and linear.zeros is not None and 0.001 < linear.zeros < 0.3
    if claim.activation_bits:
        assert linear.compute == {"int8": 14}
    assert "fell back" not in " ".join(flags(claim, found, artefact.disk_bytes(folder)))
    assert not [file.name for file in folder.iterdir() if file.suffix not in (".xml", ".bin", ".onnx", ".data", ".json")]


@pytest.mark.parametrize(("method", "settings"), [("openvino-int4", {"group_size": 128}), ("onnx-int4", {"group_size": 128})])
def test_groups_that_do_not_fit_are_refused(method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="group_size 128"):
        shipped(method, settings).check(tiny.save_model(tmp_path).shape)


def sliding(folder: Path) -> DenseModel:
    from transformers import MistralConfig, MistralForCausalLM

    MistralForCausalLM(MistralConfig(**tiny.SHAPE, sliding_window=16)).save_pretrained(folder)
    return tiny.dense_model(folder)


def test_sliding_windows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="only full attention"):
        read_dense(sliding(tmp_path).path)
