"""llmcompressor works on the device of the cell, whatever accelerator the machine has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.methods.pruning.unstructured.wanda import Wanda
from slimbench.util.compat import llmcompressor as compat
from tests.support import tiny

cache: Any = pytest.importorskip("llmcompressor.pipelines.cache", reason="needs the extra `quantization`")


def test_a_model_on_the_processor_is_compressed_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmcompressor.pipelines.sequential import pipeline

    def accelerator() -> torch.device:
        return torch.device("meta")

    monkeypatch.setattr(pipeline, "get_main_device", accelerator)
    (out := tmp_path / "out").mkdir()
    claim = Wanda().compress(tiny.save_model(tmp_path / "dense"), tiny.tokens(), out)
    assert claim.sparsity == pytest.approx(0.5, abs=0.01)
    assert pipeline.get_main_device is accelerator


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_activations_are_pinned_for_a_card_alone(device: str, pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(cache.IntermediatesCache, "_pin_intermediate", classmethod(lambda cls, value: seen.append(value)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not pinned)
    with compat.on_device(torch.device(device)):
        cache.IntermediatesCache._pin_intermediate("activations")
    assert seen == (["activations"] if pinned else [])
    cache.IntermediatesCache._pin_intermediate("restored")
    assert seen[-1] == "restored"
