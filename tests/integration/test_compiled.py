"""The compiled engine: the same numbers as the eager one, through the same protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.harness.config.schema import SuiteConfig
from slimbench.harness.engines.compiled import CompiledModel
from slimbench.harness.engines.transformers import TransformersModel, load_pretrained
from slimbench.harness.measure import perplexity


@pytest.fixture(scope="module")
def module(smollm2: Path) -> Any:
    return load_pretrained(smollm2, "cpu")


def test_compiled_decoding_chooses_the_same_tokens(module: Any) -> None:
    ids = torch.randint(0, 1000, (1, 40), generator=torch.Generator().manual_seed(0))
    chosen = []
    for model in (TransformersModel(module, "cpu"), CompiledModel(module, "cpu")):
        step, tokens = model.prefill(ids, room=12), []
        for _ in range(12):
            tokens.append(int(step.token))
            step = model.decode_step(step)
        chosen.append(tokens)
    assert sum(a == b for a, b in zip(*chosen, strict=True)) >= 11


def test_compiled_perplexity_is_that_of_the_eager_engine(module: Any, smollm2: Path) -> None:
    from transformers import AutoTokenizer

    suite = SuiteConfig(name="short", corpus=["bigbench-wikipedia"], seqlen=256, windows=3)
    windows = perplexity.Windows(AutoTokenizer.from_pretrained(smollm2), suite.passes()[0], suite)
    eager, compiled = (
        perplexity.measure(model, windows, lambda done, total: None).perplexity
        for model in (TransformersModel(module, "cpu"), CompiledModel(module, "cpu"))
    )
    print(f"perplexity eager {eager:.4f}, compiled {compiled:.4f}")
    assert compiled == pytest.approx(eager, rel=5e-3)
