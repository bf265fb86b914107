"""ONNX Runtime on a CPU: a graph with the KV cache among its inputs and outputs, all in float32.

A dense artefact is exported when it is loaded (nothing is kept).
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from slimbench.harness.engines.base import Engine
from slimbench.harness.engines.graph import Array, Cached, GraphModel, Weight, evidence_of, read_config
from slimbench.harness.measure.loaded import LoadedModel
from slimbench.harness.measure.zeros import Zeros, zeros
from slimbench.harness.schema.evidence import Evidence
from slimbench.util import files

_PRODUCTS = {  # node of a graph → what the optimiser may make of it, and the dtype of the product
    "MatMul": (("MatMul", "FusedMatMul", "Gemm"), "float32"),
    "Gemm": (("Gemm", "FusedGemm"), "float32"),
    "MatMulInteger": (("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger"), "int8"),
    "MatMulNBits": (("MatMulNBits",), "float32"),
}
_INT8_ACCURACY = 4  # level of MatMulNBits at which inputs are rounded to 8 bits
_QUANTIZED = "_quantized"


class ONNXRuntimeModel(GraphModel):
    """A session; the KV cache is a list of the runtime's own tensors, which each step reads and replaces.

    Args:
        graph: File of the graph; it is read here and no longer needed afterwards.
        scratch: Folder for the profile of one decode step.
    """

    cache_dtype = "float32"

    def __init__(self, graph: Path, config: dict[str, Any], scratch: Path) -> None:
        import onnxruntime

        super().__init__(config)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        options.enable_profiling, options.profile_file_prefix = True, str(scratch / "profile")
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._past = [node for node in self._session.get_inputs() if node.name.startswith("past.")]
        self._outputs = [node.name for node in self._session.get_outputs()]
        self.prefill(torch.zeros(1, 1, dtype=torch.int64))
        executed = _executed(Path(self._session.end_profiling()))
        self._weights = list(_weights(graph, executed))

    def fresh(self, batch: int) -> Any:
        from onnxruntime import OrtValue

        return [OrtValue.ortvalue_from_numpy(np.zeros((batch, n.shape[1], 0, n.shape[3]), np.float32)) for n in self._past]

    def run(self, feeds: dict[str, Array], memory: Any) -> tuple[Array, Any]:
        binding = self._session.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        for node, tensor in zip(self._past, memory, strict=True):
            binding.bind_ortvalue_input(node.name, tensor)
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        return logits.numpy(), present

    def cache_bytes(self, state: Cached) -> int | None:
        return sum(tensor.tensor_size_in_bytes() for tensor in state.memory)

    def evidence(self) -> Evidence:
        return evidence_of(self._weights, blocks=len(self._past) // 2)  # each has a cache of keys and one of values


class ONNXRuntimeEngine(Engine):
    """Loads graphs into sessions on the CPU."""

    version: ClassVar[int] = 1

    def open(self, artefact: Path, loader: Any, device: str, trust_remote_code: bool) -> LoadedModel:
        with files.scratch("onnx") as scratch:
            graph = loader(artefact, Path(scratch), trust_remote_code)
            return ONNXRuntimeModel(graph, read_config(artefact), Path(scratch))


def _executed(profile: Path) -> set[str]:
    """Types of the operators that ran, after the runtime's own optimisation."""
    return {event["args"]["op_name"] for event in json.loads(profile.read_text()) if "op_name" in event.get("args", {})}


def _weights(file: Path, executed: set[str]) -> Iterator[Weight]:
    """The constants of a graph: embeddings first, then the matrices, then the rest."""
    import onnx

    graph = onnx.load(file).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    head, seen = _head(graph), set[str]()
    for node in sorted(graph.node, key=lambda n: n.op_type != "Gather"):
        if node.op_type not in ("Gather", *_PRODUCTS):
            continue
        name = node.input[0 if node.op_type == "Gather" else 1]
        if name not in constants or len(constants[name].dims) < 2:
            continue
        parts = [constants[part] for part in _parts(node, name) if part in constants and part not in seen]
        seen.update(part.name for part in parts)
        role = "embedding" if node.op_type == "Gather" else "head" if node.name == head else "linear"
        yield _weight(node, role, parts, executed)
    rest = [tensor for name, tensor in constants.items() if name not in seen and tensor.data_type in (1, 10, 16)]
    yield Weight("", "Constant", "other", sum(int(np.prod(t.dims)) for t in rest), _bytes(rest))


def _parts(node: Any, name: str) -> list[str]:
    """Names of the codes, scales and zero points of a weight."""
    if node.op_type == "MatMulNBits":
        return list(node.input[1:4])
    stem = name.removesuffix(_QUANTIZED)
    return [name] if stem == name else [name, f"{stem}_scale", f"{stem}_zero_point"]


def _weight(node: Any, role: str, parts: list[Any], executed: set[str]) -> Weight:
    facts = {a.name: a.i for a in node.attribute}
    dtypes = _bytes(parts)
    if node.op_type == "MatMulNBits":
        parameters = facts["K"] * facts["N"]
        dtypes = Counter({f"uint{facts['bits']}" if dtype == "uint8" else dtype: size for dtype, size in dtypes.items()})
    else:
        parameters = int(np.prod(parts[0].dims)) if parts else 0
    weight = Weight(node.name, node.op_type, role, parameters, dtypes, _zeros(node.op_type, parts, facts) if parts else None)
    if node.op_type in _PRODUCTS:
        names, weight.compute = _PRODUCTS[node.op_type]
        rounds = facts.get("accuracy_level") == _INT8_ACCURACY
        weight.compute = "int8" if rounds else weight.compute
        ran = next((name for name in names if name in executed), names[0])
        weight.operator = f"onnxruntime {ran}" + (" × int8 inputs" if rounds else "")
    return weight


def _head(graph: Any) -> str | None:
    """Name of the matrix product nearest to the logits."""
    makers = {name: node for node in graph.node for name in node.output}
    waiting = deque(["logits"])
    while waiting:
        node = makers.get(waiting.popleft())
        if node is None:
            continue
        if node.op_type in _PRODUCTS:
            return node.name
        waiting.extend(node.input)
    return None


def _bytes(tensors: list[Any]) -> Counter[str]:
    from onnx import helper, numpy_helper

    found: Counter[str] = Counter()
    for tensor in tensors:
        found[str(helper.tensor_dtype_to_np_dtype(tensor.data_type))] += numpy_helper.to_array(tensor).nbytes
    return found


def _zeros(kind: str, parts: list[Any], facts: dict[str, int]) -> Zeros | None:
    """The zeros of a weight: of a matrix [out, in], or of an embedding [rows, width]."""
    from onnx import numpy_helper

    values = torch.from_numpy(numpy_helper.to_array(parts[0]).copy())
    if kind == "MatMulNBits":
        offsets = numpy_helper.to_array(parts[2]).copy() if len(parts) > 2 else None
        return _zeros_of_nibbles(values, offsets) if facts["bits"] == 4 else None
    if len(parts) > 2:
        values = values.to(torch.int16) - torch.from_numpy(numpy_helper.to_array(parts[2]).astype(np.int16))
    transposed = kind != "Gather" and not facts.get("transB")
    return zeros(values.T if transposed else values)


def _zeros_of_nibbles(codes: torch.Tensor, offsets: Array | None) -> Zeros:
    """Zeros of uint8 [out, groups, bytes], the lower half of a byte first; zero points are 8, or halves of bytes [out, …] too."""
    values = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(2).to(torch.int8)
    middle: Any = 8
    if offsets is not None:
        packed = torch.from_numpy(offsets.reshape(len(codes), -1))
        middle = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)[:, : codes.shape[1], None].to(torch.int8)
    return zeros((values - middle).flatten(1))
