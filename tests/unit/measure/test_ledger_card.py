"""The ledger of a card by events as torch's profiler gives them: kernels by the operators that launch them, and those of CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from slimbench.harness.measure.ledger import card, recorded
from slimbench.harness.measure.ledger.parts import Layers
from slimbench.harness.measure.ledger.place import Place
from slimbench.harness.measure.ledger.recorded import OtherPieces
from tests.unit.measure.test_ledger import module

BLOCKS = Place("product", ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))


class Trace:
    """Events of one step of a card: calls that lie within each other, and kernels that run behind them."""

    def __init__(self, ms: float) -> None:
        self.events: list[Any] = []
        self.root = self.call("slimbench step", 0.0, ms)

    def call(self, name: str, begin: float, end: float, within: Any = None, shapes: Any = None) -> Any:
        """One of milliseconds."""
        when = {"start_us": 1000 * begin, "end_us": 1000 * end}
        made = FunctionEvent(id=len(self.events) + 1, name=name, thread=1, **when, input_shapes=shapes, device_type=DeviceType.CPU)
        if within is not None:
            within.append_cpu_child(made)
        self.events.append(made)
        return made

    def kernel(self, name: str, at: float, ms: float, by: Any = None, annotation: bool = False) -> None:
        when = {"start_us": 1000 * at, "end_us": 1000 * (at + ms)}
        link = by.id if by is not None else 0
        kind = {"device_type": DeviceType.CUDA, "is_user_annotation": annotation, "linked_correlation_id": link}
        self.events.append(FunctionEvent(id=0, name=name, thread=7, **when, **kind))

    def product(self, layer: str, at: float, shapes: Any) -> Any:
        """The call that launches the kernel of a layer's product."""
        scope = self.call(f"slimbench layer {layer}", at, at + 0.4, self.root)
        outer = self.call("aten::linear", at, at + 0.3, scope, shapes)
        inner = self.call("aten::mm", at, at + 0.2, outer, shapes)
        self.call("cudaLaunchKernel", at, at + 0.1, inner)
        return inner


def eager() -> list[Any]:
    """Ten milliseconds, of which the card works seven."""
    trace = Trace(10.0)
    trace.kernel("vectorized_elementwise_kernel", 0.3, 0.5, trace.call("aten::mul", 0.1, 0.2, trace.root, [[1, 1, 512]]))
    trace.kernel("ampere_bf16_gemm", 1.5, 3.0, trace.product("model.layers.0.mlp.gate_proj", 1.0, [[1, 512], [512, 1536]]))
    attends = trace.call("aten::scaled_dot_product_attention", 2.0, 2.2, trace.root, [[1, 8, 1, 64]])
    trace.kernel("flash_fwd_kernel", 4.6, 1.0, attends)
    trace.kernel("ampere_bf16_gemm", 5.7, 1.5, trace.product("lm_head", 3.0, [[1, 512], [512, 8192]]))
    compiled = trace.call("triton_poi_fused_mul_0", 3.5, 3.6, trace.root)
    trace.kernel("triton_poi_fused_mul_0", 7.3, 1.0, compiled)
    trace.kernel("slimbench step", 0.3, 8.0, trace.root, annotation=True)
    trace.call("cudaDeviceSynchronize", 4.0, 9.9, trace.root)
    trace.kernel("of another step", 11.0, 1.0)
    return trace.events


def captured() -> list[Any]:
    """Four milliseconds of one launch."""
    trace = Trace(4.0)
    region = trace.call("Torch-Compiled Region: 0/0", 0.1, 0.3, trace.root)
    trace.call("cudaGraphLaunch", 0.1, 0.2, region)
    at = 0.2
    for name, ms in (
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", 0.2),
        ("nvjet_tst_64x8_64x16_v_bz_TNT", 1.0),
        ("splitKreduce_kernel", 0.1),
        ("triton_per_fused__softmax_add_1", 0.4),
        ("_few_rows", 1.0),
        ("triton_poi_fused_bitwise_and_mul_2", 0.1),
        ("Memcpy DtoD (Device -> Device)", 0.1),
        ("gemv2T_kernel_val", 0.6),
        ("splitKreduce_kernel", 0.1),
        ("triton_red_fused_argmax_3", 0.1),
    ):
        trace.kernel(name, at, ms, region)
        at += ms
    return trace.events


def seen(monkeypatch: pytest.MonkeyPatch, events: list[Any]) -> None:
    monkeypatch.setattr(recorded, "events_of", lambda step, count, shapes, card: events)


def test_kernels_belong_where_their_operators_do(monkeypatch: pytest.MonkeyPatch) -> None:
    seen(monkeypatch, eager())
    layers = Layers.of(module())
    pieces = card.outline(lambda: None, {})
    assert not card.in_graphs(pieces)
    places = card.places_of(pieces, layers, 1)
    assert [place.kind for place in places] == ["elementwise", "product", "attention", "head", "elementwise"]
    assert places[1] == layers.place["model.layers.0.mlp.gate_proj"]
    (times,) = card.record(lambda: None, pieces, 1, 0.0)
    assert times.pieces == pytest.approx((0.5, 3.0, 1.0, 1.5, 1.0)) and times.between is None


def test_kernels_of_a_graph_are_told_by_their_names_and_the_head_is_the_last_product(monkeypatch: pytest.MonkeyPatch) -> None:
    seen(monkeypatch, captured())
    layers = Layers.of(module(), blurred=True)
    assert set(layers.place.values()) == {BLOCKS, Place("head")}
    pieces = card.outline(lambda: None, {})
    assert card.in_graphs(pieces)
    places = card.places_of(pieces, layers, 1)
    assert [place.kind for place in places] == [
        *("elementwise", "product", "product", "attention", "product", "expansion", "copy"),
        *("head", "head", "elementwise"),
    ]
    assert places[1] == BLOCKS
    (times,) = card.record(lambda: None, pieces, 1, 0.0)
    assert sum(times.pieces) == pytest.approx(3.7)


def test_a_step_of_other_kernels_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    seen(monkeypatch, captured())
    pieces = card.outline(lambda: None, {})
    seen(monkeypatch, eager())
    with pytest.raises(OtherPieces):
        card.record(lambda: None, pieces, 1, 0.0)


def test_the_kernels_of_packed_weights_are_known_as_products() -> None:
    sources = [pytest.importorskip(f"slimbench.methods.kernels.triton.{name}") for name in ("packed_mm", "sparse24")]
    launched = ("_few_rows", "_many_rows", "_sparse_row")
    assert all(any(hasattr(getattr(source, name, None), "fn") for source in sources) for name in launched)
    assert all(card._PRODUCT.search(name) for name in (*launched, "void slimbench::decode<4, 2>(slimbench::Shape)"))
