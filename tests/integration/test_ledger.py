"""Slowdowns that are planted into steps: each is named first, and where one part takes all of it, with what it costs."""

from __future__ import annotations

import os
import statistics
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
from slimbench.harness.schema.ledger import Ledger, Phase
from slimbench.leaderboard.explain.causes import causes
from slimbench.methods.kernels.cpu.kernel import OwnCpu
from slimbench.methods.kernels.cpu.share import ShareInputs
from slimbench.methods.kernels.grid import Grid
from slimbench.methods.kernels.packed_linear import PackedLinear
from slimbench.methods.kernels.subjects import random_weight
from slimbench.methods.kernels.torch.operators import Dequantize

pytestmark = [pytest.mark.alone, pytest.mark.full]

PROMPT, NEW = 256, 33
STEPS = 64
EIGHT = Grid(8)


def dense(vocabulary: int = 16384) -> Any:
    """Large enough that products outweigh what Python takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 8}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=vocabulary, tie_word_embeddings=False)).to(torch.bfloat16).eval()


def packed(kernels: tuple[Any, ...] = (OwnCpu,), head: Grid | None = EIGHT, vocabulary: int = 16384) -> Any:
    """Random weights of 4 bits, as a loader leaves them."""
    module = dense(vocabulary)
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


def taken(*models: Any, phase: Phase = "decode", prompt: int = PROMPT) -> list[Ledger]:
    """One kind of step of each, in the same turns."""
    return [found for (found,) in ledgers(models, SpeedPoint(batch=1, prompt=prompt, new_tokens=NEW), STEPS, [phase], rehearses=False)]


def cost_of(after: Ledger, before: Ledger) -> float:
    """Milliseconds by the clock that steps of one take longer, of those that nobody recorded, in the same turns: the median over these."""
    return statistics.median(one - other for one, other in zip(after.turns, before.turns, strict=True))


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
    """A layer that multiplies in float64; on some processors float32 takes no longer than bfloat16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.double(), self.weight).to(x.dtype)


class SlowNorm(nn.Module):
    """A norm that computes much more, in one call and little memory: else weights leave the caches, and products pay a part of its cost."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm, self.found = norm, torch.empty(1 << 15)
        self.a, self.x = (torch.tensor(value).expand(len(self.found)) for value in (40.0, 41.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.igamma(self.a, self.x, out=self.found)
        return self.norm(x)


def slowed(more: Callable[[Any], object]) -> Any:
    module = dense()
    for block in module.model.layers:
        for name, layer in list(block.mlp.named_children())[:2]:
            setattr(block.mlp, name, Slowed(layer, more))
    return module


def companded(layer: Any) -> torch.Tensor:
    """Weights through a curve, as DoReFa has them (Zhou et al. 2016, equation 9).

    Scaling alone costs too little to be told from what it gives back: the products behind it find their weights in the caches.
    """
    return layer.weight.tanh()


def transposed(layer: Any) -> torch.Tensor:
    """Weights in another layout; copied as they are, they too are sooner there for the products than they cost."""
    return layer.weight.t().contiguous()


def busy(_: Any) -> None:
    until = time.perf_counter() + 8e-4
    while time.perf_counter() < until:
        pass


def wide() -> Any:
    module = dense()
    for block in module.model.layers:
        for name, layer in list(block.mlp.named_children())[:3]:
            other = Wide(layer.in_features, layer.out_features, bias=False)
            other.weight = nn.Parameter(layer.weight.double())
            setattr(block.mlp, name, other)
    return module


def odd() -> Any:
    """Inputs that no kernel takes."""
    module = packed()
    for block in module.model.layers:
        for name, sizes in (("gate_proj", (3056, 1024)), ("up_proj", (3056, 1024)), ("down_proj", (1024, 3056))):
            grid = Grid(4, 64) if sizes[1] == 1024 else Grid(4)
            setattr(block.mlp, name, PackedLinear(random_weight(grid, *sizes, torch.device("cpu"), torch.bfloat16)))
    return module


def normed() -> Any:
    module = dense()
    for block in module.model.layers:
        block.input_layernorm = SlowNorm(block.input_layernorm)
    return module


def attending_often() -> Any:
    """Each block attends twice more, for many tokens, and throws the results away."""
    module = dense()
    for block in module.model.layers:
        attention, forward = block.self_attn, block.self_attn.forward
        del attention

        def again(*given: Any, forward: Any = forward, **named: Any) -> Any:
            found = forward(*given, **named)
            for _ in range(2 * (named["past_key_values"] is not None)):
                keys = named["past_key_values"].layers[0].keys
                nn.functional.scaled_dot_product_attention(keys, keys, keys)
            return found

        block.self_attn.forward = again
    return module


def relaid(cached: torch.Tensor) -> torch.Tensor:
    """A cache in another layout and back: copied as it is, it costs so little that the calls around it come to a fifth."""
    return cached.transpose(2, 3).contiguous().transpose(2, 3).contiguous()


def copying_the_cache() -> Any:
    module = dense()
    for block in module.model.layers:
        forward = block.self_attn.forward

        def copied(*given: Any, forward: Any = forward, **named: Any) -> Any:
            for layer in getattr(named["past_key_values"], "layers", ()):
                if layer.is_initialized:
                    layer.keys, layer.values = map(relaid, (layer.keys, layer.values))
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
    phase: Phase = "decode"
    prompt: int = PROMPT


LARGE_HEADS = (lambda: packed(head=None, vocabulary=65536)), (lambda: packed(vocabulary=65536))
"""A smaller dense one drives out of the caches what makes the rest of the step a fifth of its own cost longer."""
PLANTS = {
    "kernel fallback": Plant(lambda: packed((Dequantize,)), packed, "products of gate_proj and up_proj", "dequantize + matmul"),
    "kernel fallback, compiled": Plant(
        lambda: packed((Dequantize,)), packed, "products of gate_proj and up_proj", "dequantize + matmul", CompiledModel
    ),
    "dense head": Plant(*LARGE_HEADS, "head", "bfloat16 instead of slimbench packed_mm"),
    "dense head, compiled": Plant(*LARGE_HEADS, "head", "bfloat16 instead of slimbench packed_mm", CompiledModel),
    "expansion on every step": Plant(lambda: slowed(companded), dense, "expansion of weights"),
    "a copy": Plant(lambda: slowed(transposed), dense, "copies"),
    "a float64 product, compiled": Plant(
        wide, dense, "products of gate_proj, up_proj and down_proj", "float64 instead of bfloat16", CompiledModel
    ),
    "a float64 product of a prompt": Plant(
        wide, dense, "products of gate_proj, up_proj and down_proj", "float64 instead of bfloat16", phase="prefill", prompt=64
    ),
    "odd shapes": Plant(odd, packed, "products of down_proj", "dequantize + matmul instead of slimbench packed_mm"),
    "a cache that is copied": Plant(copying_the_cache, dense, "copies", prompt=1024),
    "Python": Plant(lambda: slowed(busy), dense, "Python and launch"),
    "norms": Plant(normed, dense, "norms and elementwise"),
    "attention": Plant(attending_often, dense, "attention and cache"),
}


@pytest.mark.parametrize("name", sorted(PLANTS))
def test_what_is_planted_is_named_first(name: str) -> None:
    plant = PLANTS[name]
    honest, slow = (plant.engine(make(), "cpu") for make in (plant.honest, plant.slow))
    before, after = taken(honest, slow, phase=plant.phase, prompt=plant.prompt)
    found = causes(after, before)
    assert found and found[0].part == plant.part, (found, after, before)
    assert plant.fact in "; ".join(found[0].facts)
    assert found[0].ms == pytest.approx(cost_of(after, before), rel=0.2), (found, after, before)


@pytest.mark.parametrize("engine", [TransformersModel, CompiledModel])
@pytest.mark.parametrize("make", [dense, packed])
def test_of_honest_twins_nothing_is_named(make: Callable[[], Any], engine: Any) -> None:
    one, other = taken(*(engine(make(), "cpu") for _ in range(2)))
    assert causes(one, other) == causes(other, one) == []


SLEEPS = """
import sys, torch
from slimbench.harness.engines.compiled import CompiledModel
from tests.integration.test_ledger import packed, taken
(found,) = taken(CompiledModel(packed(), "cpu"))
print(found.model_dump_json())
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
def test_threads_that_sleep_are_named() -> None:
    """In processes of their own: how long threads stay awake is decided when the first of them starts."""
    found = []
    for spins in ("100000000", "0"):
        environment = os.environ | {"GOMP_SPINCOUNT": spins, "OMP_NUM_THREADS": "2"}
        environment.pop("OMP_WAIT_POLICY", None)
        done = subprocess.run([sys.executable, "-c", SLEEPS], env=environment, capture_output=True, text=True, timeout=600)
        assert not done.returncode, done.stderr[-2000:]
        found.append(Ledger.model_validate_json(done.stdout.splitlines()[-1]))
    awake, asleep = found
    (first,) = causes(asleep, awake)
    assert first.part == "waiting of threads" and first.ms == pytest.approx(cost_of(asleep, awake))
    assert first.ms == pytest.approx(asleep.step_ms - awake.step_ms, rel=0.2)
    assert awake.step_ms < 0.5 * asleep.step_ms and first.ms > 0.5 * asleep.step_ms


class Threads(TransformersModel):
    """Its steps work in so many threads, whatever those of others do, and are timed once more."""

    def __init__(self, module: Any, threads: int) -> None:
        super().__init__(module, "cpu")
        self._threads, self.taken = threads, list[float]()

    def prefill(self, *args: Any, **more: Any) -> Any:
        torch.set_num_threads(self._threads)
        return super().prefill(*args, **more)

    def decode_step(self, step: Any) -> Any:
        torch.set_num_threads(self._threads)
        began = time.perf_counter()
        following = super().decode_step(step)
        self.taken.append(1000 * (time.perf_counter() - began))
        return following


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
@pytest.mark.usefixtures("threads")
def test_one_thread_is_named() -> None:
    """In the same turns as two: in another minute the machine is another one."""
    two, one = Threads(dense(), 2), Threads(dense(), 1)
    before, after = taken(two, one)
    (cause,) = causes(after, before)
    assert cause.part == "1 thread, not 2 threads"
    cost = statistics.median(slow - quick for slow, quick in zip(one.taken, two.taken, strict=True))
    assert cause.ms == pytest.approx(cost, rel=0.2)
