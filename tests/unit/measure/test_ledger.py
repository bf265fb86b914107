"""The parts of a step against the step, and slowdowns that are planted: each shows in its own part, by as much as it costs."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from slimbench.harness.config.schema import SpeedPoint
from slimbench.harness.engines.compiled import CompiledModel
from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure.ledger import measured, rehearsals
from slimbench.harness.measure.ledger.measured import ledgers
from slimbench.harness.measure.ledger.parts import Layers, place_of, places_of
from slimbench.harness.measure.ledger.place import Place
from slimbench.harness.measure.ledger.products import Products
from slimbench.harness.measure.ledger.recorded import Piece
from slimbench.harness.measure.ledger.rehearsals import rehearsed
from slimbench.harness.measure.ledger.steps import Decoding, Prefill
from slimbench.methods.kernels.cpu.kernel import OwnCpu
from slimbench.methods.kernels.cpu.share import ShareInputs
from slimbench.methods.kernels.grid import Grid
from slimbench.methods.kernels.packed_linear import PackedEmbedding, PackedLinear
from slimbench.methods.kernels.subjects import random_weight

POINT = SpeedPoint(batch=1, prompt=64, new_tokens=33)
STEPS = 8
FOUR = Grid(4, 64)


def module() -> Any:
    """Large enough that products outweigh what Python takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=8192, tie_word_embeddings=False)).to(torch.bfloat16).eval()


class Odd(TransformersModel):
    """Some of its steps, or all, are made of more operators."""

    every = 1

    def decode_step(self, step: Any) -> Any:
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps % self.every == 0:
            for _ in range(self.steps):
                torch.zeros(3).add_(1)
        return super().decode_step(step)


@pytest.mark.parametrize("every", [1, 23])
def test_a_step_of_other_operators_takes_its_turn_from_both_and_no_more(every: int) -> None:
    odd = Odd(module(), "cpu")
    odd.every = every
    (one,), (other,) = ledgers([odd, TransformersModel(module(), "cpu")], POINT, 96, ["decode"], rehearses=False)
    assert other.parts and len(one.turns) >= len(other.turns) > 0
    if every == 1:
        assert one.parts == [] and one.unseen == "its steps are made of other operators each time" and len(other.turns) == 24
    else:
        assert one.parts and 0 < len(one.turns) == len(other.turns) < 24


LONG = [(TransformersModel, 2), (TransformersModel, 64), (CompiledModel, 64)]
LONGER = [(CompiledModel, 2), *((engine, new) for engine in (TransformersModel, CompiledModel) for new in (16, 32))]


@pytest.mark.parametrize(("engine", "new"), [*LONG, *(pytest.param(*case, marks=pytest.mark.full) for case in LONGER)])
def test_texts_of_any_length_have_a_ledger(engine: Any, new: int) -> None:
    """Recording has a text of its own, on compiled engines in the same cache."""
    ((decode,),) = ledgers([engine(module(), "cpu")], SpeedPoint(batch=2, prompt=96, new_tokens=new), 4, ["decode"], rehearses=new == 2)
    assert decode.parts and decode.unseen is None


@pytest.mark.parametrize("engine", [TransformersModel, CompiledModel])
def test_a_step_has_all_its_parts(engine: Any) -> None:
    """What they take together is held where nothing else runs, in `tests/integration/test_ledger.py`."""
    ((decode, prefill),) = ledgers([engine(module(), "cpu")], POINT, STEPS)
    assert (decode.phase, prefill.phase) == ("decode", "prefill")
    for ledger in (decode, prefill):
        kinds = {part.kind for part in ledger.parts}
        assert {"product", "head", "attention", "elementwise", "python"} <= kinds
        products = {part.layers[0]: part for part in ledger.parts if part.kind == "product"}
        assert sum(part.calls for part in products.values()) == 3 * 7
        assert all(
            part.low <= part.ms <= part.high and part.alone_ms is not None and part.kernels == ["bfloat16"] for part in products.values()
        )
        assert sum(part.bytes or 0 for part in products.values()) == (
            3 * 2 * (786_432 * 3 + 262_144 * 2 + 131_072 * 2) if ledger is decode else 0
        )
        settings = [("head_bits", 4), ("head_bits", 8), ("bits", 4), ("bits", 8)]
        assert [(other.setting, other.value) for other in ledger.alternatives] == settings


def shapes(*given: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return given


def test_pieces_are_told_by_layers_by_shapes_and_by_names() -> None:
    layers = Layers.of(module())
    gate = Place("product", ("gate_proj", "up_proj", "down_proj"))
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
    assert place("graph_0_cpp_fused__softmax__to_copy_add_arange_bitwise_not_c") == "attention"
    assert place("graph_0_cpp_fused_mean_mul_pow_rsqrt_1") == "elementwise"
    assert place("graph_0_cpp_fused_bitwise_and_mul_2") == "expansion"
    assert place("AOTDispatcher Runtime Wrapper Prologue") == "python"
    assert place("aten::rsqrt", (1, 1, 1)) == place("aten::digamma", (1, 512)) == "elementwise"


def test_what_is_put_together_behind_an_expansion_is_of_it() -> None:
    names = ("graph_0_cpp_fused___rshift___bitwise_and_3", "aten::cat", "graph_0_cpp_fused_mean_mul_1", "aten::cat")
    found = places_of([Piece(name, None, (), ()) for name in names], Layers.of(module()), 1)
    assert [place.kind for place in found] == ["expansion", "expansion", "elementwise", "attention"]


def test_calls_of_several_layers_are_told_by_their_order() -> None:
    joined = module()
    for layer in [layer for layer in joined.modules() if isinstance(layer, torch.nn.Linear)]:
        layer.kernel = OwnCpu.name  # type: ignore[assignment]
    layers = Layers.of(joined, joins=True)
    assert [len(group) for group in layers.groups] == [3, 1, 2, 1] * 3 + [1]
    shared = Piece("slimbench::packed_mm_shared", None, ((1, 512),), ())
    found = places_of([shared] * 6, layers, 1)
    attention, mlp = (layers.place[f"model.layers.0.{name}"] for name in ("self_attn.k_proj", "mlp.up_proj"))
    assert found == [attention, mlp] * 3 and set(attention.layers) == {"q_proj", "k_proj", "v_proj", "o_proj"}


def packed(head: Grid = FOUR) -> Any:
    made = module()
    for name, layer in list(made.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            grid = head if name == "lm_head" else FOUR
            weight = random_weight(grid, layer.out_features, layer.in_features, torch.device("cpu"), torch.bfloat16)
            made.set_submodule(name, PackedLinear(weight, kernels=(OwnCpu,)))
    return made


def test_packed_weights_are_told_from_inputs_as_large_as_weights() -> None:
    layers = Layers.of(packed())
    codes = tuple(layers.named["model.layers.0.self_attn.o_proj"].weight_packed.shape)
    assert len(codes) == 4 and layers.whose(shapes((1536, 512), codes)) == layers.place["model.layers.0.self_attn.o_proj"]
    assert layers.whose(shapes((1536, 512))) == layers.place["model.layers.0.mlp.gate_proj"] != layers.whose(shapes(codes))


def test_a_prompt_of_packed_blocks_has_all_its_parts() -> None:
    """Queries, keys and values are one product, and gate and up are."""
    ((prefill,),) = ledgers([CompiledModel(packed(), "cpu")], POINT, STEPS, ["prefill"], rehearses=False)
    calls = {(part.kind, *part.layers): part.calls for part in prefill.parts}
    assert {"head", "attention", "elementwise", "python"} <= {part.kind for part in prefill.parts} and prefill.unseen is None
    assert sum(part.calls for part in prefill.parts if part.kind == "product") == 3 * 4, calls
    assert next(part for part in prefill.parts if part.kind == "attention").calls == 3


def test_each_product_is_one_region_whatever_else_its_layer_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed layer turns its inputs and outputs round its product: three operators, of which one has threads to wait for."""
    monkeypatch.setattr(measured, "waking", lambda: 1e-4)
    ((decode,),) = ledgers([TransformersModel(packed(), "cpu")], POINT, STEPS, ["decode"], rehearses=False)
    calls = {kind: sum(part.calls for part in decode.parts if part.kind == kind) for kind in ("product", "head", "waiting")}
    assert calls == {"product": 3 * 3 * 7, "head": 3, "waiting": 3 * 7 + 1}


@pytest.mark.parametrize("joins", [False, True])
def test_products_alone_are_of_every_class(joins: bool) -> None:
    layers = Layers.of(packed(), joins)
    with torch.inference_mode():
        found = Products(layers, tokens=1, heads=1, joins=joins, own=0.0, device=torch.device("cpu"))
        assert found.milliseconds().keys() == set(layers.place.values())


def decoding(model: Any) -> Decoding:
    return Decoding(model, torch.zeros(1, 16, dtype=torch.long), 64)


@pytest.mark.parametrize("engine", [TransformersModel, CompiledModel])
def test_other_grids_are_rehearsed_in_the_step_itself(engine: Any) -> None:
    """Each in the place of the layers that are there, which are back afterwards."""
    model = engine(packed(head=Grid(8)), "cpu")
    layers = Layers.of(model.module)
    ids = torch.randint(8192, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = model.generate(ids, 8)
        found = list(rehearsed(model, layers, decoding, 6))
        assert model.generate(ids, 8) == before
    assert [(other.setting, other.value, other.group_size) for other in found] == [
        ("head_bits", None, None),
        ("head_bits", 4, None),
        ("bits", 8, 64),
        ("group_size", 32, 32),
        ("group_size", 128, 128),
        ("bits", None, None),
    ]
    assert all(model.module.get_submodule(name) is layer for name, layer in layers.named.items())


@pytest.mark.parametrize(
    ("engine", "is_packed"),
    [
        *((TransformersModel, is_packed) for is_packed in (False, True)),
        (CompiledModel, True),
        pytest.param(CompiledModel, False, marks=pytest.mark.full),
    ],
)
def test_a_rehearsal_runs_what_a_loader_would_give(engine: Any, is_packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of a model that was made of the other layers, and its embedding where that shares the weight of the head."""
    model = engine(tied(is_packed), "cpu")
    own, ids = dict(model.module.named_modules()), torch.randint(8192, (1, 16), generator=torch.Generator().manual_seed(0))
    seen = []

    def changes(of: Any, others: Any, *_: Any) -> list[float]:
        with rehearsals._swapped(of.module, others):
            twin = of.anew()
        expected = engine(remade(of.module, others), "cpu").generate(ids, 8)
        with rehearsals._swapped(of.module, others):
            assert twin.generate(ids, 8) == expected
            assert isinstance(of.module.get_input_embeddings(), PackedEmbedding) is isinstance(of.module.lm_head, PackedLinear)
            holds = any(isinstance(layer, PackedLinear) for layer in of.module.modules())
            assert (of.module.graph_pass is not None) is holds
        seen.append((set(others) & {"lm_head", "model.embed_tokens"}, expected))
        return [0.0] * 6

    monkeypatch.setattr(rehearsals, "_changes", changes)
    with torch.inference_mode():
        before = model.generate(ids, 8)
        found = list(rehearsed(model, Layers.of(model.module), decoding, 6))
        assert model.generate(ids, 8) == before
    heads = [held for held, _ in seen if held]
    assert len(seen) == len(found) == (6 if is_packed else 4) and heads == [{"lm_head", "model.embed_tokens"}] * 2
    assert len({str(tokens) for _, tokens in seen}) > 1
    assert dict(model.module.named_modules()) == own


def tied(is_packed: bool) -> Any:
    """The head shares its weight with the embedding."""
    made = packed(head=Grid(8)) if is_packed else module()
    if is_packed:
        made.model.embed_tokens = PackedEmbedding(made.lm_head)
    else:
        made.lm_head.weight = made.model.embed_tokens.weight
    return made


def remade(original: Any, others: Any) -> Any:
    """A module of its own, with copies of the other layers."""
    made = copy.deepcopy(original)
    for name, layer in copy.deepcopy(dict(others)).items():
        made.set_submodule(name, layer)
    made.graph_pass = ShareInputs()
    return made


@pytest.mark.parametrize("engine", [TransformersModel, CompiledModel])
def test_what_another_layer_takes_is_what_its_rehearsal_says(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks, each of which takes forty milliseconds longer, and nothing of what the first run compiles.

    So long because other tests run beside this one, and what they take is no part of it.
    """

    class Slow(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.04)
            return super().forward(x)

    model = engine(module(), "cpu")
    slow = {f"model.layers.{at}.mlp.down_proj": Slow(1536, 512, bias=False, dtype=torch.bfloat16) for at in range(3)}
    monkeypatch.setattr(rehearsals, "_asked", lambda _: [rehearsals._Asked("bits", 4, Grid(4), tuple(slow))])
    monkeypatch.setattr(rehearsals, "_made", lambda *_: slow)
    begun = decoding if engine is TransformersModel else lambda of: Prefill(of, torch.zeros(1, 16, dtype=torch.long), 64)
    with torch.inference_mode():
        (found,) = rehearsed(model, Layers.of(model.module), begun, 6)
    assert 110 < found.low <= found.change_ms <= found.high < 220


def test_other_grids_have_offsets_where_those_of_the_layers_have() -> None:
    """They cost time of their own."""
    shifted = module()
    for name, layer in list(shifted.named_modules()):
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            weight = random_weight(Grid(4, 64), layer.out_features, layer.in_features, torch.device("cpu"), torch.bfloat16)
            shifted.set_submodule(name, PackedLinear(replace(weight, offsets=weight.scales.clone())))
    layers = Layers.of(shifted)
    made = {
        (asked.setting, asked.value): rehearsals._made(asked, layers, TransformersModel(shifted, "cpu"))
        for asked in rehearsals._asked(layers)
    }
    assert {("head_bits", 8), ("bits", 8), ("group_size", 32), ("bits", None)} <= made.keys()
    for setting, others in made.items():
        assert others
        held = {getattr(layer, "has_offsets", None) for layer in others.values()}
        assert held == ({None} if setting == ("bits", None) else {setting[0] != "head_bits"})


class Library(torch.nn.Linear):
    """As libraries have them: codes in place of the weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


def test_layers_of_libraries_are_compared_with_no_grid_and_get_inputs_of_the_model() -> None:
    foreign = module()
    for name, layer in list(foreign.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            other = Library(layer.in_features, layer.out_features, bias=False)
            other.weight = torch.nn.Parameter(torch.zeros_like(layer.weight, dtype=torch.uint8), requires_grad=False)
            foreign.set_submodule(name, other)
    layers = Layers.of(foreign)
    found = Products(layers, tokens=1, heads=1, joins=False, own=0.0, device=torch.device("cpu"))
    assert {x.dtype for x in found._inputs} == {torch.bfloat16} and list(rehearsals._asked(layers)) == []


def test_where_a_policy_decides_there_is_the_time_of_a_step_alone() -> None:
    model = TransformersModel(module(), "cpu")
    model.slots = ["depth"]
    (found,), both = ledgers([model, TransformersModel(module(), "cpu")], POINT, 4)
    assert found.unseen == "a policy decides what runs in a step" and found.parts == [] and found.step_ms > 0
    assert [ledger.phase for ledger in both] == ["decode", "prefill"]
    assert len(found.turns) == len(both[0].turns) == 6 and all(len(part.turns) == 6 for ledger in both for part in ledger.parts)
