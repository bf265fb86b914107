"""Prune, recover, quantize: after each step the loaded artefact is what the pipeline claims by then, and claimed zeros stay to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from slimbench.harness.config import engines
from slimbench.harness.config.parse import build_method
from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure import claims
from slimbench.harness.measure.loaded import LoadedModel
from slimbench.harness.store import artefact
from slimbench.methods.base import DenseModel, Needs
from slimbench.methods.formats import edited
from slimbench.methods.formats.packed import PackedLinear
from tests.contract.shipped import CHEAP, make, opened
from tests.unit.methods.test_methods import shipped_step

PIPELINES: list[tuple[str, ...]] = [
    ("wanda-2of4", "mask-lora", "gptq"),
    ("magnitude", "sparse-ft", "rtn-4bit"),
    ("sparsegpt", "scale-lora", "gptq-8bit"),
    ("minitron-width-25", "lora", "rtn-4bit-row"),
    ("shortgpt", "dylora", "rtn-8bit"),
    ("flap-25", "bitfit", "rtn-8bit"),
    ("svd-80", "norms", "rtn-8bit"),
    ("shortgpt", "kd", "gptq"),
    ("minitron-width-25", "kd", "rtn-4bit-row"),
]


def weights(model: LoadedModel) -> dict[str, Tensor]:
    """Weights of the linear layers in the blocks, as the engine computes with them, by name."""
    assert isinstance(model, TransformersModel)
    layers = {name: layer for name, layer in model.module.named_modules() if ".layers." in f".{name}" and hasattr(layer, "in_features")}
    return {name: layer.dequantize() if isinstance(layer, PackedLinear) else layer.weight.detach() for name, layer in layers.items()}


@pytest.mark.parametrize("names", PIPELINES, ids="+".join)
def test_every_step_keeps_what_the_pipeline_claims_by_then(names: tuple[str, ...], dense: DenseModel, tmp_path: Path) -> None:
    current, claim, needs, before = dense, None, list[Needs](), dict[str, Tensor]()
    for index, name in enumerate(names):
        method: Any = build_method(shipped_step(name))
        method = replace(method, **CHEAP.get(method.name, {}))
        if claim:
            assert claim.format in method.accepts, "a step says what it may follow"
        step = make(method, current, tmp_path / str(index))
        claim = claim.then(step.claim) if claim else step.claim
        needs.append(method.needs)
        manifest = artefact.read_manifest(step.folder).model_copy(update={"claim": claim})
        artefact.write_manifest(step.folder, manifest)
        model = opened(engines.able(claim.format), step.folder)
        found = claims.check(model, claim, artefact.disk_bytes(step.folder), needs, manifest.dense_parameters)
        assert [flag for flag in found.flags if flag.startswith(("claims", "trains", "asks"))] == [], name
        after = weights(model)
        if claim.sparsity is not None:
            assert after.keys() == (before or after).keys()
            for layer, zeros in before.items():
                assert bool((after[layer][zeros] == 0).all()), f"{name} fills zeros of {layer}"
        before = {layer: weight == 0 for layer, weight in after.items()}
        shape = edited.shape_of(step.folder) if claim.format == "edited" else dense.shape
        current = replace(current, path=step.folder, format=claim.format, shape=shape, original=dense.path)
    assert claim and claim.bits and claim.training_tokens, "it is a pipeline of three"
