"""Pruning of the real model layer by layer, on text that no method has seen: what updates are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from slimbench.methods.base import Calibration, DenseModel
from slimbench.methods.core import statistics
from slimbench.methods.core.layers import block_linears
from slimbench.methods.pruning.unstructured.admm import ADMM
from slimbench.methods.pruning.unstructured.sparsegpt import SparseGPT
from slimbench.tasks import calibration
from tests.support import tiny

pytestmark = [pytest.mark.integration, pytest.mark.full]

SAMPLES, LENGTH, LAYERS = 16, 512, 210


@pytest.fixture(scope="module")
def dense(smollm2: Path) -> DenseModel:
    return tiny.dense_model(smollm2)


@pytest.fixture(scope="module")
def windows(smollm2: Path) -> tuple[Calibration, torch.Tensor]:
    """Three quarters of some windows to prune by, and the last quarter."""
    ids = calibration.sample("lee-news", AutoTokenizer.from_pretrained(smollm2), SAMPLES, LENGTH, 0)
    fit = SAMPLES * 3 // 4
    return Calibration(ids[:fit], "three quarters"), ids[fit:]


@pytest.mark.parametrize("method", [SparseGPT(sparsity=0.5), ADMM(sparsity=0.5)], ids=lambda method: method.name)
def test_updates_lower_the_error_of_every_layer_on_text_that_was_held_out(
    method: Any, dense: DenseModel, windows: tuple[Calibration, torch.Tensor], tmp_path: Path
) -> None:
    """On inputs from the pruned blocks before a layer, against the same mask without updates."""
    seen, held = windows
    method.compress(dense, seen, tmp_path)
    pruned = tiny.dense_model(tmp_path).load()
    original, updated = ({name: layer.weight.detach().double() for name, layer in block_linears(m).items()} for m in (dense.load(), pruned))
    shares = {}
    for name, found in statistics.of_model(pruned, held, gram=True).items():
        assert found.gram is not None
        gone = updated[name] == 0
        errors = [
            float(((w - original[name]) @ found.gram.double() * (w - original[name])).sum())
            for w in (updated[name], original[name].masked_fill(gone, 0))
        ]
        shares[name] = errors[0] / errors[1]
    print(f"{method.name}: error left {min(shares.values()):.3f} to {max(shares.values()):.3f}")
    assert len(shares) == LAYERS and max(shares.values()) < 1
