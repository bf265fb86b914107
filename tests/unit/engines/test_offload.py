"""Offloaded weights: the numbers of the eager engine, nothing resident between calls, and evidence that says where the bytes are."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.harness.config import engines as catalogue
from slimbench.harness.config.parse import build_method
from slimbench.harness.config.schema import SpeedPoint
from slimbench.harness.config.targets import locate
from slimbench.harness.engines import offload
from slimbench.harness.engines.transformers import TransformersModel, load_pretrained
from slimbench.harness.measure import memory
from slimbench.harness.measure.offloaded import brought_in
from slimbench.harness.schema.evidence import Evidence
from slimbench.harness.store import artefact
from slimbench.methods.base import Unsupported
from tests.support import tiny
from tests.unit.methods.test_methods import shipped_step

IDS = tiny.tokens(2, 40).ids
MB = 2**20
METHODS = ("dense", "rtn-4bit", "rtn-4bit-head8", "rtn-w4a8", "nvfp4-weight", "kv-fp8", "slicegpt")
LARGER = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}  # 61 MB in bfloat16, its largest layer 2 MB

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes artefacts of a tiny model, each once: `make(method, shape)`."""

    @cache
    def made(method: str, *shape: tuple[str, Any]) -> Path:
        source, out = tmp_path_factory.mktemp("dense"), tmp_path_factory.mktemp("artefact")
        dense, built = tiny.save_model(source, **dict(shape)), build_method(shipped_step(method))
        claim = built.compress(dense, tiny.tokens(8, 64) if built.needs.calibration else None, out)
        artefact.write_manifest(out, artefact.Manifest(key="test", model="tiny", pipeline=[], claim=claim))
        return out

    return made


def load(engine: str, folder: Path) -> TransformersModel:
    found = catalogue.get(engine)
    return locate(found.target)(loaders=found.loaders).load(folder, "cpu")


def held(model: TransformersModel) -> int:
    """Bytes of the parameters and buffers that are in memory."""
    tensors = [*model.module.parameters(), *model.module.buffers()]
    return sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)


def facts(evidence: Evidence) -> dict[str, Any]:
    """All but where the bytes are."""
    return evidence.model_dump(exclude={"weight_bytes", "offloaded_bytes"})


@pytest.mark.parametrize("method", METHODS)
def test_numbers_and_evidence_are_those_of_the_eager_engine_but_nothing_is_resident(make: Make, method: str) -> None:
    eager, away = load("transformers", make(method)), load("offload", make(method))
    rotary = sum(tensor.nbytes for tensor in away.module.model.rotary_emb.buffers())
    assert held(away) == rotary
    assert torch.equal(away.logits(IDS, start=5), eager.logits(IDS, start=5))
    (first, state), (expected, cache) = away.extend(IDS[:, :7]), eager.extend(IDS[:, :7])
    assert torch.equal(first, expected) and torch.equal(away.extend(IDS[:, 7:], state)[0], eager.extend(IDS[:, 7:], cache)[0])
    step, known = away.prefill(IDS), eager.prefill(IDS)
    for _ in range(4):
        step, known = away.decode_step(step), eager.decode_step(known)
        assert torch.equal(step.token, known.token)
    found, whole = away.evidence(), eager.evidence()
    assert facts(found) == facts(whole) and whole.offloaded_bytes == 0
    assert (found.weight_bytes, found.offloaded_bytes) == (rotary, whole.weight_bytes - rotary)
    assert held(away) == rotary


@pytest.mark.parametrize("tied", [True, False])
def test_an_artefact_of_several_files_stays_in_them(make: Make, tmp_path: Path, tied: bool) -> None:
    whole = make("dense", ("tie_word_embeddings", tied))
    load_pretrained(whole, "cpu").save_pretrained(tmp_path, max_shard_size="60KB")
    (tmp_path / artefact.MANIFEST).write_bytes((whole / artefact.MANIFEST).read_bytes())
    files = set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())
    away = load("offload", tmp_path)
    assert torch.equal(away.logits(IDS), load("transformers", whole).logits(IDS))
    found = away.evidence()
    parameters = sum(p.numel() for p in load("transformers", whole).module.parameters())
    assert (found.parameters, found.offloaded_bytes) == (parameters, 2 * parameters)
    hooks = [module._hf_hook for module in away.module.modules() if getattr(module, "_hf_hook", None)]
    entries = [entry for hook in hooks if hook.offload for entry in hook.weights_map.dataset.index.values()]
    assert len(files) > 2 and {Path(entry["safetensors_file"]) for entry in entries} == {tmp_path / name for name in files}


def test_weights_in_host_memory_are_the_same_weights(make: Make) -> None:
    """What a card uses, with the CPU as the card."""
    for method in ("dense", "rtn-4bit-head8"):
        eager, module = load("transformers", make(method)), load("transformers", make(method)).module
        offload.move_away(module, torch.device("cpu"), to_disk=False)
        away = TransformersModel(module, "cpu")
        assert torch.equal(away.logits(IDS), eager.logits(IDS))
        found, whole = away.evidence(), eager.evidence()
        assert facts(found) == facts(whole)
        assert found.weight_bytes + found.offloaded_bytes == whole.weight_bytes and found.weight_bytes == held(away) < 1000


def test_experts_that_the_files_hold_one_by_one_are_written_anew(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    MixtralForCausalLM(MixtralConfig(**tiny.SHAPE, num_local_experts=4)).save_pretrained(tmp_path)
    eager = TransformersModel(load_pretrained(tmp_path, "cpu"), "cpu")
    away = TransformersModel(offload.load_pretrained(tmp_path, "cpu"), "cpu")
    assert all(parameter.is_meta for parameter in away.module.parameters())
    assert torch.equal(away.logits(IDS), eager.logits(IDS))
    found, whole = away.evidence(), eager.evidence()
    assert facts(found) == facts(whole) and found.weight_bytes + found.offloaded_bytes == whole.weight_bytes


def test_a_layer_is_brought_in_for_as_long_as_it_is_read(make: Make) -> None:
    away = load("offload", make("dense"))
    layer = away.module.model.layers[0].mlp.up_proj
    with brought_in(layer) as elsewhere:
        assert layer.weight.device.type == "cpu" and len(elsewhere) == 1
        ((file, name),) = elsewhere.values()
        assert (Path(file), name) == (make("dense") / "model.safetensors", "model.layers.0.mlp.up_proj.weight")
    assert layer.weight.is_meta
    with brought_in(load_pretrained(make("dense"), "cpu")) as elsewhere:
        assert elsewhere == {}


def test_files_that_were_written_are_gone_with_the_model(make: Make, cache: Path) -> None:
    def written() -> list[Path]:
        return list((cache / "artefacts").glob(".offload-*/*.safetensors"))

    gc.collect()
    before = written()
    away = load("offload", make("rtn-4bit"))
    (file,) = set(written()) - set(before)
    assert away.evidence().offloaded_bytes < file.stat().st_size < away.evidence().offloaded_bytes + 10_000
    del away
    gc.collect()
    assert not file.parent.exists()


@pytest.mark.skipif(not memory._reset_peak(), reason="the system keeps no peak that can be reset")
def test_the_memory_measurement_shows_what_is_saved(make: Make) -> None:
    """Of one layer at a time the bytes are there: the peak is above what rests by the largest layer, not by the model."""
    folder, point = make("dense", *LARGER.items()), SpeedPoint(batch=1, prompt=8, new_tokens=2)
    away = load("offload", folder)
    memory._generate(away, point)
    found = away.evidence()
    memory.give_back()  # of earlier tests: free memory would hide what the eager engine takes
    split = memory.measure(away, point, found.weight_bytes)
    assert found.offloaded_bytes > 50 * MB and split.weight_bytes == found.weight_bytes < 1000
    assert split.activation_bytes is not None and split.activation_bytes < 12 * MB
    eager = load("transformers", folder)
    memory._generate(eager, point)
    assert memory.measure(eager, point, 0).process_bytes > split.process_bytes + 40 * MB  # type: ignore[operator]


def test_drafts_are_refused_in_one_line(make: Make) -> None:
    away = load("offload", make("prompt-lookup"))
    with pytest.raises(Unsupported, match="drafts do not run where each layer brings in its weights"):
        away.prefill(torch.zeros(1, 4, dtype=torch.int64), 4)
