"""Every method that says it can follow an edited architecture does: its artefact, loaded by an engine, holds the joined claim."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.harness.config import engines
from slimbench.harness.config.registry import entries
from slimbench.harness.config.targets import locate
from slimbench.harness.measure import claims
from slimbench.harness.store import artefact
from slimbench.methods.base import EDITED, Claim, DenseModel, Method, Unsupported
from slimbench.methods.core.architecture import surgery
from slimbench.methods.formats import edited
from slimbench.methods.formats.huggingface import save_dense
from tests.contract.shipped import ALIKE, SLOW, classes, sound
from tests.support import tiny
from tests.support.architectures import make
from tests.support.taught import given
from tests.unit.methods.formats.test_edited import cut_channels, cut_heads

FOLLOWERS = {type(item.method).__name__: item.method for item in [*entries()][::-1] if EDITED in item.method.accepts}
SHORT = {"steps": 4, "group_size": 32, "batch_size": 2, "length": 16, "iterations": 2, "sequences": 4, "rank": 4, "samples": 4, "growth": 1}
SHORT |= {"examined": 2, "answer_tokens": 8, "rounds": 1, "runs": 2, "pairs": 2, "prompt_tokens": 4}
OWN: dict[str, dict[str, int]] = {"Linformer": {"block": 8}, "RoutingTransformer": {"centroids": 4}, "SelfSpeculation": {"blocks": 1}}
OWN |= {"PrunedDraft": {"blocks": 2}, "LayerSkip": {"every": 2}, "TokenReduction": {"layer": 1}}
"""By the name of a class: what it is asked to do less of, beside that."""
DROPPING = {"ShortGPT", "LayerDropping", "ContributionDropping", "EveryOther", "LayerDrop"}
"""Methods that leave out one of three blocks."""
COMPARING = {"TinyBERT", "MiniLM"}
"""They compare heads with the teacher's one by one, and a block of the base has fewer."""
TAUGHT = ALIKE & {name for name, method in classes().items() if method.needs.text}
"""They write what `instruct` writes, by the same code."""
NO_KERNEL = "fell back to dequantize + dense matmul"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[DenseModel, Claim]:
    """Three blocks: one of fewer heads and channels, one without attention and with a factor pair."""
    folder, model = tmp_path_factory.mktemp("base"), make("llama", torch.bfloat16, head_dim=32)
    cut_heads(model)
    cut_channels(model)
    surgery.remove_part(model, "model.layers.2", "attention")
    left, values, right = torch.linalg.svd(model.model.layers[2].mlp.up_proj.weight.detach().float())
    surgery.factorize(model, "model.layers.2.mlp.up_proj", right[:32], left[:, :32] * values[:32])
    save_dense(model, folder)
    dense = dataclasses.replace(tiny.dense_model(folder), format=EDITED, shape=edited.shape_of(folder))
    return dense, Claim(EDITED, **surgery.counts(model))


def brief(method: Method) -> Method:
    settings = {field.name for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    changed = {name: value for name, value in SHORT.items() if name in settings and getattr(method, name) is not None}
    changed |= OWN.get(type(method).__name__, {})
    return dataclasses.replace(method, **changed | ({"length": 160} if method.needs.text else {}))  # type: ignore[type-var]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.full] * (FOLLOWERS[name].name in TAUGHT or FOLLOWERS[name].name in SLOW)) for name in FOLLOWERS],
)
def test_a_method_that_accepts_edits_keeps_them(name: str, base: tuple[DenseModel, Claim], tmp_path: Path) -> None:
    method, (dense, before) = brief(FOLLOWERS[name]), base
    if method.needs.missing_modules():
        pytest.skip(f"{name} needs {', '.join(method.needs.missing_modules())}")
    method.check(dense.shape)
    if method.needs.zeros:
        dense = tiny.sparse(dense, dense.path.with_name(f"{dense.path.name}-sparse"))
    if method.family == "distillation":
        dense = dataclasses.replace(
            dense, original=tiny.saved(make("llama", torch.bfloat16, head_dim=32, num_hidden_layers=5), tmp_path / "first").path
        )
        tmp_path = tmp_path / "artefact"
        tmp_path.mkdir()
    dense = given(method, dense, tmp_path)
    if name in COMPARING:
        with pytest.raises(Unsupported, match="the student has 2 heads"):
            method.compress(dense, tiny.tokens(16, 32), tmp_path)
        return
    claim = before.then(method.compress(dense, tiny.tokens(16, 32) if method.needs.calibration else None, tmp_path))
    assert claim.format == method.produces_after(EDITED)
    artefact.write_manifest(tmp_path, artefact.Manifest(key="k", model="tiny", pipeline=[], claim=claim))
    engine: Any = engines.able(claim.format)
    model = locate(engine.target)(loaders=engine.loaders).load(tmp_path, "cpu")
    found = claims.check(model, claim, artefact.disk_bytes(tmp_path))
    assert found.blocks == 3 - (name in DROPPING) and found.parameters == claim.parameters
    expected = {f"{claim.pattern} mask without a sparse kernel"} if claim.pattern else set()
    expected |= {claims.UNMEASURED} if claim.work else set()
    assert {flag for flag in found.flags if not flag.startswith(NO_KERNEL) and "activations" not in flag} == expected
    assert sound(model, tiny.tokens(2, 12).ids)


def test_many_methods_follow() -> None:
    assert len(FOLLOWERS) > 30
