"""Ledgers of a card. Run by hand: `pytest -n 0 tests/gpu`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from slimbench.harness.config.schema import SpeedPoint
from slimbench.harness.engines.compiled import CompiledModel
from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure.ledger.measured import ledgers
from slimbench.leaderboard.explain.causes import causes
from slimbench.methods.kernels.grid import Grid
from slimbench.methods.kernels.packed_linear import PackedLinear
from slimbench.methods.kernels.subjects import random_weight

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")]

POINT = SpeedPoint(batch=1, prompt=512, new_tokens=33)
STEPS = 48


def dense() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 6, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = LlamaConfig(**shape, vocab_size=65536, tie_word_embeddings=False)
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()


def packed(head: bool = True) -> Any:
    module = dense()
    for name, layer in list(module.named_modules()):
        if isinstance(layer, torch.nn.Linear) and (head or name != "lm_head"):
            grid = Grid(8) if name == "lm_head" else Grid(4, 64)
            weight = random_weight(grid, layer.out_features, layer.in_features, torch.device("cuda"), torch.bfloat16)
            module.set_submodule(name, PackedLinear(weight))
    return module


@pytest.mark.parametrize("engine", [TransformersModel, CompiledModel])
@pytest.mark.parametrize("make", [dense, packed])
def test_parts_make_the_step(make: Callable[[], Any], engine: Any) -> None:
    (found,) = ledgers([engine(make(), "cuda")], POINT, STEPS)
    for ledger in found:
        kinds = {part.kind for part in ledger.parts}
        assert {"product", "head", "attention", "elementwise"} <= kinds, ledger
        assert 0.90 <= 1 - ledger.rest_ms / ledger.step_ms <= 1.05, ledger
    assert found[0].alternatives


def test_a_dense_head_is_named_first() -> None:
    (slow,), (honest,) = ledgers([CompiledModel(packed(head=False), "cuda"), CompiledModel(packed(), "cuda")], POINT, STEPS, ["decode"])
    first, *_ = causes(slow, honest)
    assert first.part == "head" and first.ms == pytest.approx(slow.step_ms - honest.step_ms, rel=0.2)
