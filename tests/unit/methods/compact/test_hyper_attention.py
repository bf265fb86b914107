"""HyperAttention as a method: what it asks for, and that a prompt's estimate reaches what follows it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.methods.base import Calibration
from slimbench.methods.compact.hyper_attention import HyperAttention
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.attention.hyper import Hyper
from tests.support import tiny

METHOD = HyperAttention(block=8, samples=8, projections=3, shortest=16)


def test_what_follows_a_prompt_is_under_its_estimate(tmp_path: Path) -> None:
    dense = tiny.save_model(tmp_path / "dense", "float32")
    model = dense.load()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    dense, out = tiny.saved(model, tmp_path / "sharp"), tmp_path / "out"
    out.mkdir()
    METHOD.compress(replace(dense, seed=4), Calibration.none(), out)
    assert policies.read(out)[0] == [Hyper(8, 8, 3, 16, seed=4)]
    loaded = policies.load(out)
    assert loaded.scoring == "suffix"

    def after(module: Any, prompt: int) -> torch.Tensor:
        ids, scored = tiny.tokens(samples=2, length=96).ids, TransformersModel(module, "cpu")
        _, state = scored.extend(ids[:, :prompt])
        return scored.extend(ids[:, prompt:], state)[0]

    assert torch.allclose(after(loaded, 31), after(dense.load(), 31), atol=1e-3), "a short prompt is exact"
    assert not torch.allclose(after(loaded, 80), after(dense.load(), 80), atol=1e-2)


def test_the_seed_of_the_cell_is_added_to_that_of_the_method() -> None:
    assert HyperAttention(seed=2).policy(3) == Hyper(256, 256, 7, 4096, seed=5)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="shortest must be at least 1"):
        HyperAttention(shortest=0)
