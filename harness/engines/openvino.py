"""OpenVINO on a CPU: a stateful graph, whose KV cache lives in the inference request.

A dense artefact is converted when it is loaded (nothing is kept); its matrices become float16, the runtime's usual storage for them,
and artefacts of format `openvino` are read as they are. The runtime's defaults are kept, but for the arithmetic: it would choose
bfloat16 where the processor has it and an 8-bit KV cache. Both would change what a method is measured by, and on processors with
AVX512-BF16 but without AMX the fused bfloat16 attention of OpenVINO 2026.4 gives wrong numbers, NaN among them. So activations and
cache are float32. What stays is that inputs of 8-bit and 4-bit weights are rounded to int8, group by group: the evidence says so.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from slimbench.harness.engines.base import Engine
from slimbench.harness.engines.graph import Array, Cached, GraphModel, Weight, evidence_of, read_config
from slimbench.harness.measure.ledger.place import Place
from slimbench.harness.measure.loaded import CountsTime, LoadedModel
from slimbench.harness.measure.zeros import Zeros, zeros
from slimbench.harness.schema.evidence import Evidence
from slimbench.harness.schema.ledger import PartKind

_DECOMPRESSION = ("Convert", "Multiply", "Subtract", "Reshape", "Transpose")
_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i8": "int8", "u8": "uint8", "i4": "int4", "u4": "uint4"}
_PACKED = ("i8", "u8", "i4", "u4")
_LAYER = re.compile(r"(\w+)/[^/]*(?:MatMul|linear)")
_KINDS: dict[str, PartKind] = {
    "FullyConnected": "product",
    "MatMul": "attention",
    "Softmax": "attention",
    "Concatenation": "attention",
    "MemoryInput": "attention",
    "MemoryOutput": "attention",
    "ScaledDotProductAttention": "attention",
    "ScaledDotProductAttentionWithKVCache": "attention",
    "Reorder": "copy",
    "Transpose": "copy",
}
"""Parts of a ledger by types of nodes; all others are elementwise."""


class OpenVINOModel(GraphModel, CountsTime):
    """A compiled stateful graph; each sequence of calls has an inference request of its own, which holds its KV cache.

    Args:
        counts: It counts the time of each node, which takes some itself.
    """

    cache_dtype = "float32"
    uncounted = "OpenVINO counts whole microseconds of each node, and neither what lies between nodes nor the waiting of threads"

    def __init__(self, graph: Any, config: dict[str, Any], counts: bool = False) -> None:
        import openvino

        super().__init__(config)
        self.graph, self._config = graph, config
        self._compiled = openvino.Core().compile_model(graph, "CPU", properties() | ({"PERF_COUNT": True} if counts else {}))
        self._calls = self._counted = 0
        self._request: Any = None
        self._spent = Counter[Place]()

    def fresh(self, batch: int) -> Any:
        return self._compiled.create_infer_request()

    def run(self, feeds: dict[str, Array], memory: Any) -> tuple[Array, Any]:
        self._calls, self._request = self._calls + 1, memory
        beam = np.arange(len(feeds["ids"]), dtype=np.int32)
        return memory.infer(feeds | {"beam": beam}, share_outputs=True)["logits"], memory

    def cache_bytes(self, state: Cached) -> int | None:
        tensors = [variable.state for variable in state.memory.query_state()]
        return sum(tensor.byte_size for tensor in tensors)

    def counting(self) -> OpenVINOModel:
        """A graph that was never called: of each node the runtime gives a mean over all calls."""
        return OpenVINOModel(self.graph, self._config, counts=True)

    def counted(self) -> Mapping[Place, tuple[int, float]]:
        assert self._request is not None
        before, self._spent = self._spent, Counter()
        nodes, calls, places = Counter[Place](), self._calls - self._counted, self._places
        for node in self._request.get_profiling_info():
            place = places.get(node.node_name) or Place(_KINDS.get(node.node_type, "elementwise"))
            ms = 1000 * node.real_time.total_seconds() * self._calls
            self._spent[place] += ms
            nodes[place] += calls
        self._counted = self._calls
        return {place: (nodes[place], ms - before[place]) for place, ms in self._spent.items()}

    @cached_property
    def _places(self) -> dict[str, Place]:
        """Where products belong, by the names that their nodes have once compiled."""
        head, found = _head(self.graph), dict[str, Place]()
        heads = {node.get_friendly_name() for node in self.graph.get_ops() if node.get_name() == head}
        for node in self._compiled.get_runtime_model().get_ops():
            facts = node.get_rt_info()
            if facts["layerType"].astype(str) == "FullyConnected":
                names = facts["originalLayersNames"].astype(str).split(",")
                layers = dict.fromkeys(each[1] for name in names if (each := _LAYER.search(name)))
                found[node.get_friendly_name()] = Place("head") if heads & set(names) else Place("product", tuple(layers))
        return found

    def evidence(self) -> Evidence:
        self.decode_step(self.prefill(torch.zeros(1, 8, dtype=torch.int64)))  # primitives are chosen in the first call
        precision = properties()["INFERENCE_PRECISION_HINT"].get_type_name()
        weights = list(_weights(self.graph))
        layers = _executed(self._compiled)
        group = int(self._compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE"))
        for weight in weights:
            if weight.role in ("linear", "head") and (primitive := layers.get(weight.name)):
                packed = primitive.rpartition(" ")[2] in _PACKED and group > 0
                weight.operator = f"openvino {primitive}" + (f" × int8 inputs in groups of {group}" if packed else "")
                weight.compute = "int8" if packed else _DTYPES[precision]
        return evidence_of(weights, blocks=len(self.graph.get_sinks()) // 2)  # each keeps its keys and its values


def properties() -> dict[str, Any]:
    """What a graph is compiled with."""
    import openvino

    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": openvino.Type.f32,
        "KV_CACHE_PRECISION": openvino.Type.f32,
    }


def _executed(compiled: Any) -> dict[str, str]:
    """The primitive of each fully connected layer with the type of its weights, by the name that the layer has in the graph."""
    found: dict[str, str] = {}
    for node in compiled.get_runtime_model().get_ops():
        facts = node.get_rt_info()
        if facts["layerType"].astype(str) == "FullyConnected":
            primitive = f"{facts['primitiveType'].astype(str)} {node.input(1).get_element_type().get_type_name()}"
            found |= dict.fromkeys(facts["originalLayersNames"].astype(str).split(","), primitive)
    return found


def _weights(graph: Any) -> Iterator[Weight]:
    """The constants of a graph: embeddings first, since a head may share theirs, then the matrices, then the rest."""
    seen: set[str] = set()
    nodes, head = sorted(graph.get_ops(), key=lambda node: node.get_type_name() != "Gather"), _head(graph)
    for node in nodes:
        kind = node.get_type_name()
        if kind not in ("Gather", "MatMul"):
            continue
        weight = node.input_value(0 if kind == "Gather" else 1)
        constants = _constants(weight.get_node())
        if not constants or len(weight.get_partial_shape()) != 2 or not weight.get_element_type().is_real():
            continue
        fresh = [constant for constant in constants if constant.get_name() not in seen]
        seen.update(constant.get_name() for constant in fresh)
        role = "embedding" if kind == "Gather" else "head" if node.get_name() == head else "linear"
        parameters = weight.get_partial_shape().get_max_shape() if fresh else (0,)
        yield Weight(node.get_friendly_name(), kind, role, int(np.prod(parameters)), _bytes(fresh), _zeros(fresh) if fresh else None)
    rest = [n for n in nodes if n.get_type_name() == "Constant" and n.get_name() not in seen and n.get_element_type().is_real()]
    yield Weight("", "Constant", "other", sum(int(np.prod(n.get_output_shape(0))) for n in rest), _bytes(rest))


def _constants(node: Any) -> list[Any] | None:
    """The constants that a weight is computed from, codes, scales and zero points; None where it is no weight."""
    kind = node.get_type_name()
    if kind == "Constant":
        return [node]
    if kind not in _DECOMPRESSION:
        return None
    sources = node.input_values()[: 1 if kind in ("Reshape", "Transpose") else None]
    found = [_constants(source.get_node()) for source in sources]
    return None if None in found else [constant for part in found if part for constant in part]


def _head(graph: Any) -> str | None:
    """Name of the matrix product nearest to the logits."""
    waiting = deque(result.input_value(0).get_node() for result in graph.results)
    while waiting:
        node = waiting.popleft()
        if node.get_type_name() == "MatMul":
            return node.get_name()
        waiting.extend(source.get_node() for source in node.input_values())
    return None


def _bytes(constants: list[Any]) -> Counter[str]:
    found: Counter[str] = Counter()
    for constant in constants:
        dtype = constant.get_element_type().get_type_name()
        found[_DTYPES.get(dtype, dtype)] += constant.get_byte_size()
    return found


def _zeros(constants: list[Any]) -> Zeros:
    """The zeros of a matrix [out, in] with these codes, scales and zero points."""
    codes, *others = (
        torch.from_numpy(constant.get_data(dtype=np.float32))
        for constant in sorted(constants, key=lambda c: -int(np.prod(c.get_output_shape(0))))
        if constant.get_element_type().get_type_name() in _PACKED or len(constants) == 1
    )
    return zeros(sum((-other for other in others), codes).flatten(1))


class OpenVINOEngine(Engine):
    """Loads graphs and compiles them for the CPU."""

    version: ClassVar[int] = 1

    def open(self, artefact: Path, loader: Any, device: str, trust_remote_code: bool) -> LoadedModel:
        return OpenVINOModel(loader(artefact, device, trust_remote_code), read_config(artefact))
