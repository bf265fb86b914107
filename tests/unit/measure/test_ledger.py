"""The parts of a step against the step, and slowdowns that are planted: each shows in its own part, by as much as it costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from slimbench.harness.config.schema import SpeedPoint
from slimbench.harness.engines.compiled import CompiledModel
from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure.ledger.measured import ledgers
from slimbench.harness.measure.ledger.parts import Layers, Place, place_of
from slimbench.harness.measure.ledger.recorded import Piece
from slimbench.harness.schema.ledger import Ledger

POINT = SpeedPoint(batch=1, prompt=64, new_tokens=33)
TURNS = 8


def module() -> Any:
    """Large enough that products outweigh what Python takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=8192, tie_word_embeddings=False)).to(torch.bfloat16).eval()


def decoded(model: Any) -> Ledger:
    found, first = ledgers(model, POINT, TURNS)
    assert (found.phase, first.phase) == ("decode", "prefill")
    return found


def ms(ledger: Ledger, kind: str, layer: str | None = None) -> float:
    return sum(part.ms for part in ledger.parts if part.kind == kind and (layer is None or layer in part.layers))


@pytest.mark.parametrize("engine", [TransformersModel, CompiledModel])
def test_parts_make_the_step(engine: Any) -> None:
    model = engine(module(), "cpu")
    for ledger in ledgers(model, POINT, TURNS):
        assert 0.9 <= 1 - ledger.rest_ms / ledger.step_ms <= 1.05, ledger
        kinds = {part.kind for part in ledger.parts}
        assert {"product", "head", "attention", "elementwise", "python"} <= kinds
        products = {part.layers[0]: part for part in ledger.parts if part.kind == "product"}
        assert sum(part.calls for part in products.values()) == 3 * 7
        assert all(part.low <= part.ms <= part.high and part.alone_ms for part in products.values())


def shapes(*given: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return given


def test_pieces_are_told_by_layers_by_shapes_and_by_names() -> None:
    layers = Layers.of(module())
    gate = Place("product", ("gate_proj", "up_proj"))
    assert layers.place["model.layers.0.mlp.gate_proj"] == gate == layers.whose(shapes((1, 512), (512, 1536)))
    assert layers.place["lm_head"] == Place("head") and layers.activation == 8192

    def place(name: str, *given: tuple[int, ...], layer: str | None = None) -> str:
        return place_of(Piece(name, layer, given, ()), layers, 1).kind

    assert place("aten::mm", (1, 512), (512, 8192)) == "head"
    assert place("aten::bmm", (8, 1, 64), (8, 64, 97)) == "attention"
    assert place("aten::scaled_dot_product_attention", (1, 8, 1, 64)) == "attention"
    assert place("aten::mul", (1536, 512), layer="model.layers.0.mlp.up_proj") == "expansion"
    assert place("aten::clone", (1536, 512), layer="model.layers.0.mlp.up_proj") == "copy"
    assert place("aten::clone", (1, 512), layer="model.layers.0.mlp.up_proj") == "product"
    assert place("graph_0_cpp_fused__softmax__to_copy_add_3") == "attention"
    assert place("graph_0_cpp_fused_mean_mul_pow_rsqrt_1") == "elementwise"
    assert place("graph_0_cpp_fused_bitwise_and_mul_2") == "expansion"
    assert place("AOTDispatcher Runtime Wrapper Prologue") == "python"
    assert place("aten::rsqrt", (1, 1, 1)) == "elementwise"


class Slowed(nn.Module):
    """A layer that does something more on each call."""

    def __init__(self, layer: Any, more: Callable[[Any], object]) -> None:
        super().__init__()
        self.layer, self.more = layer, more
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.more(self.layer)
        found: torch.Tensor = nn.functional.linear(x, self.layer.weight)
        return found


def busy(_: Any) -> None:
    until = time.perf_counter() + 2e-4
    while time.perf_counter() < until:
        pass


def copied(layer: Any) -> None:
    layer.weight.clone()


def expanded(layer: Any) -> None:
    layer.weight.mul(2)


PLANTED: dict[str, tuple[Callable[[Any], object], str]] = {
    "Python": (busy, "python"),
    "a copy": (copied, "copy"),
    "an expansion": (expanded, "expansion"),
}


@pytest.mark.parametrize("name", sorted(PLANTED))
def test_what_is_planted_shows_in_its_part(name: str) -> None:
    more, kind = PLANTED[name]
    honest, slowed = module(), module()
    for block in slowed.model.layers:
        block.mlp.up_proj = Slowed(block.mlp.up_proj, more)
    before, after = decoded(TransformersModel(honest, "cpu")), decoded(TransformersModel(slowed, "cpu"))
    cost = after.step_ms - before.step_ms
    grown = {
        part: ms(after, part) - ms(before, part) for part in ("product", "head", "attention", "elementwise", "expansion", "copy", "python")
    }
    assert max(grown, key=lambda part: grown[part]) == kind, grown
    assert grown[kind] == pytest.approx(cost, rel=0.2)


def test_where_a_policy_decides_there_is_the_time_of_a_step_alone() -> None:
    model = TransformersModel(module(), "cpu")
    model.slots = ["depth"]
    (found,) = ledgers(model, POINT, 4)
    assert found.unseen == "a policy decides what runs in a step" and found.parts == [] and found.step_ms > 0
