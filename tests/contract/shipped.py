"""Every shipped method class once, with settings by which it takes seconds on a tiny model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.harness.config import engines
from slimbench.harness.config.registry import entries
from slimbench.harness.config.schema import EngineConfig
from slimbench.harness.config.targets import locate
from slimbench.harness.measure.loaded import LoadedModel
from slimbench.harness.stages import models
from slimbench.harness.store import artefact
from slimbench.methods.base import Calibration, Claim, DenseModel, Method, Unsupported
from tests.support import tiny
from tests.support.taught import given

CALIBRATION = tiny.tokens(samples=8, length=32)
TRAINED = {"steps": 9, "batch_size": 2, "length": 16, "checkpoint_every": 4}
CHEAP: dict[str, dict[str, Any]] = {
    "accuracy-predictor": {"configurations": 12, "candidates": 50, "tokens": 64},
    "adalora": TRAINED,
    "adaptive-span": TRAINED | {"ramp": 4, "learning_rate": 0.05},
    "adapter": TRAINED,
    "adapterdrop": TRAINED,
    "adapterfusion": TRAINED,
    "adaround": {"steps": 3},
    "apt": TRAINED | {"fade": 0.5},
    "assistant": TRAINED,
    "asvd": {"tokens": 64},
    "awq": {"candidates": 4},
    "bcq": {"rounds": 2},
    "besa": {"steps": 4},
    "bitfit": TRAINED,
    "block-lasso": TRAINED,
    "block-movement": TRAINED,
    "cofi": TRAINED,
    "compacter": TRAINED,
    "compresso": TRAINED | {"prompt": ""},
    "context": TRAINED | {"length": 64},
    "distilbert": TRAINED,
    "draft-blocks": {"blocks": 1},
    "dsp-heads": TRAINED,
    "dylora": TRAINED,
    "fitnets": TRAINED,
    "dynabert": TRAINED | {"depth": 0.5},
    "early-exit": TRAINED,
    "entmax": TRAINED,
    "flexround": {"steps": 3},
    "flop": TRAINED,
    "fsp": TRAINED | {"pairs": 2},
    "gkd": TRAINED | {"prompt_tokens": 4},
    "gmp": TRAINED,
    "gmp-star": TRAINED,
    "grain": TRAINED,
    "grouped-query": TRAINED,
    "gum": TRAINED,
    "homodistil": TRAINED | {"every": 1},
    "in-context": TRAINED | {"length": 160},
    "instruct": TRAINED | {"length": 64},
    "kard": TRAINED | {"length": 64},
    "kd": TRAINED,
    "kmeans": {"steps": 5},
    "knorm": {"skip_layers": 1},
    "l0-weights": TRAINED,
    "layerdrop": TRAINED,
    "layerskip": TRAINED | {"every": 2},
    "latent-attention": TRAINED | {"rank": 24, "pairs": 4, "tokens": 64},
    "linear-learned": TRAINED | {"window": 8},
    "linformer": TRAINED | {"block": 8},
    "lion": TRAINED | {"length": 160, "examined": 4, "answer_tokens": 48},
    "llm-qat": TRAINED | {"sequences": 4, "generation_batch": 4},
    "llm-surgeon": {"shots": 2, "correlated": 100},
    "llm-surgeon-units": {"shots": 2},
    "loftq": TRAINED,
    "loraprune": TRAINED,
    "lorashear": TRAINED,
    "losparse": TRAINED,
    "lottery": TRAINED,
    "mask-lora": TRAINED,
    "mcc-kd": TRAINED | {"length": 64},
    "mccarley": TRAINED,
    "minillm": TRAINED | {"prompt_tokens": 4},
    "minilm": TRAINED,
    "mixed-precision": {"average_bits": 4.0},
    "movement": TRAINED,
    "mutual": TRAINED,
    "norms": TRAINED,
    "obert": TRAINED | {"prunes": 2},
    "omniquant": {"steps": 3},
    "peqa": TRAINED,
    "platon": TRAINED,
    "prefix-tuning": TRAINED | {"hidden": 32},
    "programs": TRAINED | {"length": 64},
    "pst": TRAINED,
    "qa-lora": TRAINED,
    "qlora": TRAINED,
    "quest": {"dense_layers": 1},
    "rationale": TRAINED | {"length": 64},
    "rpp": TRAINED,
    "scale-lora": TRAINED,
    "reflection": TRAINED | {"length": 160, "examined": 4, "answer_tokens": 48, "samples": 2},
    "scotd": TRAINED | {"length": 64},
    "scott": TRAINED | {"length": 64},
    "self-speculation": {"blocks": 1},
    "sheared-llama": TRAINED,
    "skip-layer": TRAINED,
    "signround": {"iterations": 12, "batch_size": 2},
    "simple": TRAINED,
    "socratic": TRAINED | {"length": 64},
    "soft-movement": TRAINED,
    "soup": TRAINED,
    "sparse-adapter": TRAINED | {"batches": 2},
    "sparse-ft": TRAINED,
    "spinquant": TRAINED,
    "spinquant-rtn": TRAINED,
    "squeezellm": {"steps": 5},
    "sr-ste": TRAINED,
    "static-pruning": TRAINED,
    "symbolic": TRAINED | {"length": 64},
    "ted": TRAINED | {"pairs": 2},
    "ternary-qat": TRAINED,
    "tinybert": TRAINED,
    "torchao-qat": TRAINED,
    "token-reduction": {"layer": 1},
    "transformer-vq": {"codes": 8, "exact": 8, "steps": 4},
    "tsld": TRAINED,
    "voita-heads": TRAINED,
    "vptq": {"index_bits": 6, "steps": 5},
    "zeroquant-lkd": {"steps": 3},
    "ziplm": {"cost": "products", "candidates": 8, "speedup": 3.0},
}
"""By a method's name: what it is asked to do less of."""


@cache
def classes() -> dict[str, Method]:
    """One method of each class, by its name."""
    found: dict[str, Method] = {}
    for entry in entries():
        found.setdefault(entry.method.name, entry.method)
    return {name: replace(method, **CHEAP.get(name, {})) for name, method in sorted(found.items())}


SLOW = {"kv-quanto": "its library compiles an extension for minutes when it is first used"}
ALIKE = {"assistant", "distilbert", "fitnets", "fsp", "minillm", "mutual", "ted"}
ALIKE |= {"context", "in-context", "kard", "lion", "mcc-kd", "programs", "rationale", "scotd", "scott", "socratic", "symbolic"}
ALIKE |= {"compresso", "mccarley"}
ALIKE |= {"h2o", "tova", "knorm", "snapkv", "spatten", "random-eviction", "quest", "reformer", "sinkhorn", "hyper-attention", "combiner"}
ALIKE |= {"sparse-transformer", "longformer", "bigbird", "blockbert", "bp-transformer", "linear-attention", "prompt-lookup"}
ALIKE |= {"adaptive-span", "entmax", "latent-attention", "linformer", "skip-layer", "layerskip", "draft-blocks"}
ALIKE |= {"token-reduction"}
"""They are trained and written by the code that trains and writes `kd`, `gkd`, `minilm` and `tinybert`, or `instruct` and `reflection`, or
`cofi` and `voita-heads`, or `linear-learned` and `early-exit`, or `layerdrop`, or `draft-model`, or they are policies that are written as
`streaming-llm` is, and kept to their promises in test_policies.py; what is their own is tried in their own tests."""


def marked(names: Iterable[str]) -> list[Any]:
    """Names as parameters; slow ones, and those that others stand for, in `make test-full` alone."""
    return [pytest.param(name, marks=[pytest.mark.full] if name in {*SLOW, *ALIKE} else []) for name in names]


NAMES = marked(classes())


def runnable(name: str) -> Method:
    """The method, unless something is missing that it needs."""
    method = classes()[name]
    if missing := method.needs.missing_modules():
        pytest.skip(f"{name} needs {', '.join(missing)}")
    return method


@dataclass(frozen=True)
class Made:
    """The artefact of a method."""

    method: Method
    folder: Path
    claim: Claim

    def load(self) -> LoadedModel:
        """The artefact through the first engine that can run here."""
        try:
            engine = engines.able(self.method.produces)
        except Unsupported as missing:
            pytest.skip(str(missing))
        return opened(engine, self.folder)


def sound(model: LoadedModel, ids: Tensor) -> bool:
    """Whether all logits are numbers; a decoder that is no distribution over all tokens may rule some out."""
    logits = model.logits(ids)
    return bool((torch.isfinite(logits) | ((logits == -torch.inf) & (model.scoring == "none"))).all())


def opened(engine: EngineConfig, folder: Path) -> LoadedModel:
    return locate(engine.target)(loaders=engine.loaders).load(folder, "cpu")


def make(method: Method, dense: DenseModel, out: Path) -> Made:
    out.mkdir(parents=True)
    method.check(dense.shape)
    if method.needs.zeros:
        dense = tiny.sparse(dense, dense.path.with_name(f"{dense.path.name}-sparse"))
    if method.family == "distillation":
        dense = tiny.first(dense, dense.path.with_name(f"{dense.path.name}-first"))
    dense = given(method, dense, out)
    claim = method.compress(dense, CALIBRATION if method.needs.calibration else Calibration.none(), out)
    dense_parameters = models.matrix_parameters(dense.path)
    manifest = artefact.Manifest(key="contract", model="tiny", pipeline=[], claim=claim, dense_parameters=dense_parameters)
    artefact.write_manifest(out, manifest)
    return Made(method, out, claim)
