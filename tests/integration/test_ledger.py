"""Ledgers of steps that are timed: parts make the step, and what is planted is named first, with what it costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from slimbench.harness.config.schema import SpeedPoint
from slimbench.harness.engines.compiled import CompiledModel
from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure.ledger.measured import ledgers
from slimbench.harness.schema.ledger import Ledger
from slimbench.leaderboard.explain.causes import causes
from slimbench.methods.kernels.cpu.kernel import OwnCpu
from slimbench.methods.kernels.cpu.share import ShareInputs
from slimbench.methods.kernels.grid import Grid
from slimbench.methods.kernels.packed_linear import PackedLinear
from slimbench.methods.kernels.subjects import random_weight
from slimbench.methods.kernels.torch.operators import Dequantize

pytestmark = [pytest.mark.alone, pytest.mark.full]

POINT = SpeedPoint(batch=1, prompt=256, new_tokens=33)
TURNS = 12
EIGHT = Grid(8)


def dense(**more: Any) -> Any:
    """Large enough that products outweigh what Python takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 8}
    return LlamaForCausalLM(LlamaConfig(**shape | more, vocab_size=16384, tie_word_embeddings=False)).to(torch.bfloat16).eval()


def packed(kernels: tuple[Any, ...] = (OwnCpu,), head: Grid | None = EIGHT) -> Any:
    """Random weights of 4 bits, as a loader leaves them."""
    module = dense()
    for block in module.model.layers:
        for holder, name in [(block.self_attn, each) for each in ("q_proj", "k_proj", "v_proj", "o_proj")] + [
            (block.mlp, each) for each in ("gate_proj", "up_proj", "down_proj")
        ]:
            setattr(holder, name, random_layer(getattr(holder, name), Grid(4, 64), kernels if name == "up_proj" else (OwnCpu,)))
    if head:
        module.lm_head = random_layer(module.lm_head, head, (OwnCpu,))
    module.graph_pass = ShareInputs()
    return module


def random_layer(layer: Any, grid: Grid, kernels: tuple[Any, ...]) -> PackedLinear:
    weight = random_weight(grid, layer.out_features, layer.in_features, torch.device("cpu"), torch.bfloat16)
    return PackedLinear(weight, kernels=kernels)


def decoded(module: Any, engine: Any = TransformersModel) -> Ledger:
    return ledgers(engine(module, "cpu"), POINT, TURNS)[0]


class Slowed(nn.Module):
    """A layer that does something more on each call."""

    def __init__(self, layer: Any, more: Callable[[Any], object]) -> None:
        super().__init__()
        self.layer, self.more = layer, more
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.more(self.layer)
        return nn.functional.linear(x, self.layer.weight)


class Wide(nn.Linear):
    """A layer that multiplies in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.float(), self.weight).to(x.dtype)


class SlowNorm(nn.Module):
    """A norm that is computed again and again."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(24):
            found = self.norm(x)
        return found


def slowed(more: Callable[[Any], object]) -> Any:
    module = dense()
    for block in module.model.layers:
        block.mlp.up_proj = Slowed(block.mlp.up_proj, more)
    return module


def busy(_: Any) -> None:
    until = time.perf_counter() + 4e-4
    while time.perf_counter() < until:
        pass


def wide() -> Any:
    module = dense()
    for block in module.model.layers:
        layer = Wide(1024, 3072, bias=False)
        layer.weight = nn.Parameter(block.mlp.up_proj.weight.float())
        block.mlp.up_proj = layer
    return module


def normed() -> Any:
    module = dense()
    for block in module.model.layers:
        block.input_layernorm = SlowNorm(block.input_layernorm)
    return module


def attending_twice() -> Any:
    """Each block attends three times, and throws two results away."""
    module = dense()
    for block in module.model.layers:
        attention, forward = block.self_attn, block.self_attn.forward
        del attention

        def again(*given: Any, forward: Any = forward, **named: Any) -> Any:
            found = forward(*given, **named)
            for _ in range(6 * (named["past_key_values"] is not None)):
                keys = named["past_key_values"].layers[0].keys.repeat_interleave(2, 1)
                nn.functional.scaled_dot_product_attention(keys[:, :, -1:], keys, keys)
            return found

        block.self_attn.forward = again
    return module


def copying_the_cache() -> Any:
    module = dense()
    for block in module.model.layers:
        forward = block.self_attn.forward

        def copied(*given: Any, forward: Any = forward, **named: Any) -> Any:
            for layer in getattr(named["past_key_values"], "layers", ()):
                if layer.is_initialized:
                    layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
            return forward(*given, **named)

        block.self_attn.forward = copied
    return module


@dataclass(frozen=True)
class Plant:
    """A slowdown, its honest twin, and what names it."""

    slow: Callable[[], Any]
    honest: Callable[[], Any]
    part: str
    fact: str = ""
    engine: Any = TransformersModel


PLANTS = {
    "kernel fallback": Plant(lambda: packed((Dequantize,)), packed, "products of gate_proj and up_proj", "dequantize + matmul"),
    "kernel fallback, compiled": Plant(
        lambda: packed((Dequantize,)), packed, "products of gate_proj and up_proj", "dequantize + matmul", CompiledModel
    ),
    "dense head": Plant(lambda: packed(head=None), packed, "head", "bfloat16 instead of slimbench packed_mm"),
    "dense head, compiled": Plant(
        lambda: packed(head=None), packed, "head", "bfloat16 instead of slimbench packed_mm", engine=CompiledModel
    ),
    "expansion on every step": Plant(lambda: slowed(lambda layer: layer.weight.mul(2)), dense, "expansion of weights"),
    "a copy": Plant(lambda: slowed(lambda layer: layer.weight.clone()), dense, "copies"),
    "a float32 product": Plant(wide, dense, "products of gate_proj, up_proj and down_proj", "float32 instead of bfloat16"),
    "a float32 product, compiled": Plant(
        wide, dense, "products of gate_proj, up_proj and down_proj", "float32 instead of bfloat16", engine=CompiledModel
    ),
    "odd shapes": Plant(lambda: dense(intermediate_size=1535), dense, "products of gate_proj, up_proj and down_proj"),
    "a cache that is copied": Plant(copying_the_cache, dense, "copies"),
    "Python": Plant(lambda: slowed(busy), dense, "Python and launch"),
    "norms": Plant(normed, dense, "norms and elementwise"),
    "attention": Plant(attending_twice, dense, "attention and cache"),
}


@pytest.mark.parametrize("name", sorted(PLANTS))
def test_what_is_planted_is_named_first(name: str) -> None:
    plant = PLANTS[name]
    before, after = decoded(plant.honest(), plant.engine), decoded(plant.slow(), plant.engine)
    found = causes(after, before)
    assert found and found[0].part == plant.part, (found, after, before)
    assert plant.fact in "; ".join(found[0].facts)
    assert found[0].ms == pytest.approx(after.step_ms - before.step_ms, rel=0.2), (found, after, before)


@pytest.mark.parametrize("engine", [TransformersModel, CompiledModel])
@pytest.mark.parametrize("make", [dense, packed])
def test_of_honest_twins_nothing_is_named(make: Callable[[], Any], engine: Any) -> None:
    first, second = decoded(make(), engine), decoded(make(), engine)
    assert causes(first, second) == [] == causes(second, first), (first, second)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
def test_one_thread_is_named(threads: Callable[[int], None]) -> None:
    threads(2)
    before = decoded(dense())
    threads(1)
    after = decoded(dense())
    (cause,) = causes(after, before)
    assert cause.part == "1 thread, not 2 threads" and cause.ms == pytest.approx(after.step_ms - before.step_ms)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
def test_threads_that_sleep_are_named() -> None:
    """In processes of their own: what OpenMP does between regions is decided once."""
    before, after = (_in_a_process({"GOMP_SPINCOUNT": spins}) for spins in ("1000000", "0"))
    found = causes(after, before)
    assert found and found[0].part == "waiting of threads", (found, after, before)
    assert found[0].ms == pytest.approx(after.step_ms - before.step_ms, rel=0.2), (found, after, before)


def _in_a_process(variables: dict[str, str]) -> Ledger:
    code = "from tests.integration.test_ledger import *; print(decoded(packed(), CompiledModel).model_dump_json())"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, check=True)
    return Ledger(**json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("engine", [TransformersModel, CompiledModel])
@pytest.mark.parametrize("make", [dense, packed])
def test_parts_make_the_step(make: Callable[[], Any], engine: Any) -> None:
    for ledger in ledgers(engine(make(), "cpu"), POINT, TURNS):
        assert 0.9 <= 1 - ledger.rest_ms / ledger.step_ms <= 1.05, ledger
        assert all(part.low <= part.ms <= part.high for part in ledger.parts)


@pytest.mark.parametrize("engine", [TransformersModel, CompiledModel])
@pytest.mark.parametrize(
    ("setting", "value", "here", "there"),
    [
        ("head_bits", 8, lambda: packed(head=None), packed),
        ("head_bits", None, packed, lambda: packed(head=None)),
        ("head_bits", 4, packed, lambda: packed(head=Grid(4, 32))),
    ],
    ids=["a head of 8 bits", "a dense head", "a head of 4 bits"],
)
def test_what_is_foretold_comes_true(setting: str, value: int | None, here: Any, there: Any, engine: Any) -> None:
    """Better and worse settings: the gain within 10 % of the one that is measured."""
    ledger, measured = decoded(here(), engine), decoded(there(), engine)
    (other,) = [each for each in ledger.alternatives if (each.setting, each.value) == (setting, value)]
    assert ledger.step_ms / (ledger.step_ms + other.change_ms) == pytest.approx(ledger.step_ms / measured.step_ms, rel=0.1), (
        ledger,
        measured,
    )
