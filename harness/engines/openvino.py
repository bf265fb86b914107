"""OpenVINO on a CPU: a stateful graph, whose KV cache lives in the inference request.

A dense artefact is converted when it is loaded (nothing is kept); its matrices become float16, the runtime's usual storage for them,
and artefacts of format `openvino` are read as they are. The runtime's defaults are kept, but for the arithmetic: it would choose
bfloat16 where the processor has it and an 8-bit KV cache. Both would change what a method is measured by, and on processors with
AVX512-BF16 but without AMX the fused bfloat16 attention of OpenVINO 2026.4 gives wrong numbers, NaN among them. So activations and
cache are float32. What stays is that inputs of 8-bit and 4-bit weights are rounded to int8, group by group: the evidence says so.
"""

from __future__ import annotations

import tempfile
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.engines import _export
from harness.engines._export import Array, Cached, GraphModel, Weight
from harness.engines.base import Engine, LoadedModel
from harness.measure.zeros import Zeros, zeros
from harness.record import Evidence

IR = "openvino_model.xml"
"""The graph of an artefact of format `openvino`; its constants lie beside it in `openvino_model.bin`."""

_BEAM = "beam"
_DECOMPRESSION = ("Convert", "Multiply", "Subtract", "Reshape", "Transpose")
_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i8": "int8", "u8": "uint8", "i4": "int4", "u4": "uint4"}
_PACKED = ("i8", "u8", "i4", "u4")


def load_dense(folder: Path, device: str = "cpu", trust_remote_code: bool = False) -> Any:
    """The graph of a dense source, its matrices in float16."""
    import openvino

    exact = convert(folder, trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="slimbench-openvino-") as scratch:
        openvino.save_model(exact, Path(scratch) / IR, compress_to_fp16=True)
        graph = _read(Path(scratch))
    _restore(graph, exact)
    return graph


def _restore(graph: Any, exact: Any) -> None:
    """Undo what the compression to float16 does to constants that are no matrices: the frequencies of rotary positions among them."""
    from openvino import opset13 as ops

    originals = {node.get_friendly_name(): node for node in exact.get_ops() if node.get_type_name() == "Constant"}
    for node in graph.get_ops():
        original = originals.get(node.get_friendly_name())
        if node.get_type_name() == "Convert" and original and len(original.get_output_shape(0)) != 2:
            constant = ops.constant(original.data, dtype=np.float32)
            for target in node.output(0).get_target_inputs():
                target.replace_source_output(constant.output(0))
    graph.validate_nodes_and_infer_types()


def load_ir(folder: Path, device: str = "cpu", trust_remote_code: bool = False) -> Any:
    """The graph of an artefact of format `openvino`."""
    return _read(folder)


def _read(folder: Path) -> Any:
    import openvino

    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})
    return core.read_model(folder / IR)


def convert(folder: Path, trust_remote_code: bool = False) -> Any:
    """The stateful `openvino.Model` of a dense source, in float32.

    Raises:
        methods.base.Unsupported: The model cannot be exported.
    """
    import openvino

    decoder = _export.read_dense(folder, trust_remote_code)
    model = openvino.convert_model(_export.traced(decoder), example_input=decoder.example())
    past = decoder.names("past")
    shapes = [[-1, -1], [-1], [-1], [-1], *([-1, heads, -1, width] for heads, width in decoder.cache)]
    for port, name, shape in zip(model.inputs, [*_export.INPUTS, *past], shapes, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
        port.get_node().set_partial_shape(openvino.PartialShape(shape))
    model.outputs[0].get_tensor().set_names({_export.LOGITS})
    model.validate_nodes_and_infer_types()
    _keep_state(model, past, decoder.cache)
    return model


def _keep_state(model: Any, names: list[str], cache: list[tuple[int, int]]) -> None:
    """Turn inputs and outputs of the KV cache into state that is empty at first.

    A further input, `beam`, says which sequence each one goes on with: the runtime fuses cache and attention only around it.
    """
    import openvino
    from openvino import opset13 as ops
    from openvino.op.util import Variable, VariableInfo

    beam = ops.parameter([-1], np.int32, name=_BEAM)
    beam.output(0).get_tensor().set_names({_BEAM})
    batch = ops.gather(ops.shape_of(model.input("ids").get_node()), ops.constant(np.array([0])), ops.constant(0))
    inputs, outputs = model.inputs[len(_export.INPUTS) :], model.results[1:]
    writes = []
    for port, result, name, (heads, width) in zip(inputs, outputs, names, cache, strict=True):
        info = VariableInfo()
        info.variable_id, info.data_type = name, openvino.Type.f32
        info.data_shape = openvino.PartialShape([-1, heads, -1, width])
        variable = Variable(info)
        empty = ops.broadcast(ops.constant(np.float32(0)), ops.concat([batch, ops.constant(np.array([heads, 0, width]))], 0))
        held = ops.gather(ops.read_value(empty, variable), beam, ops.constant(0))
        for target in port.get_target_inputs():
            target.replace_source_output(held.output(0))
        writes.append(ops.assign(result.input_value(0).get_node(), variable))
        model.remove_result(result)
        model.remove_parameter(port.get_node())
    model.add_parameters([beam])
    model.add_sinks(writes)
    model.validate_nodes_and_infer_types()


class OpenVINOModel(GraphModel):
    """A compiled stateful graph; each sequence of calls has an inference request of its own, which holds its KV cache."""

    def __init__(self, graph: Any, config: dict[str, Any]) -> None:
        import openvino

        super().__init__(config)
        self.graph = graph
        self._precision = openvino.Type.f32
        self._compiled = openvino.Core().compile_model(
            graph,
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "INFERENCE_PRECISION_HINT": self._precision,
                "KV_CACHE_PRECISION": self._precision,
            },
        )

    def fresh(self, batch: int) -> Any:
        return self._compiled.create_infer_request()

    def run(self, feeds: dict[str, Array], memory: Any) -> tuple[Array, Any]:
        beam = np.arange(len(feeds["ids"]), dtype=np.int32)
        return memory.infer(feeds | {_BEAM: beam}, share_outputs=True)[_export.LOGITS], memory

    def cache_bytes(self, state: Cached) -> int | None:
        tensors = [variable.state for variable in state.memory.query_state()]
        return sum(tensor.byte_size for tensor in tensors)

    def evidence(self) -> Evidence:
        self.decode_step(self.prefill(torch.zeros(1, 8, dtype=torch.int64)))  # primitives are chosen in the first call
        weights = list(_weights(self.graph))
        layers = _executed(self._compiled)
        group = int(self._compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE"))
        for weight in weights:
            if weight.role in ("linear", "head") and (primitive := layers.get(weight.name)):
                packed = primitive.rpartition(" ")[2] in _PACKED and group > 0
                weight.operator = f"openvino {primitive}" + (f" × int8 inputs in groups of {group}" if packed else "")
                weight.compute = "int8" if packed else _DTYPES[self._precision.get_type_name()]
        return _export.evidence_of(weights)


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

    def open(self, artefact: Path, loader: Any, device: str, trust_remote_code: bool) -> LoadedModel:
        return OpenVINOModel(loader(artefact, device, trust_remote_code), _export.read_config(artefact))
