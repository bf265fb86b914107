"""The evidence of a model that llama.cpp runs, read from the tensors of its GGUF file.

llama.cpp does not show its operators, but it keeps every tensor in the type in which the file holds it, and the type decides the
product: inputs of a product with quantized blocks are rounded to 8 bits, block by block, those of a product with
floats to the type of the weight.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.quants import dequantize

from slimbench.harness.schema.evidence import Evidence, LayerEvidence

_COMPUTE = {
    GGMLQuantizationType.F32: "float32",
    GGMLQuantizationType.F16: "float16",
    GGMLQuantizationType.BF16: "bfloat16",
}
_ROLES = {"token_embd.weight": "embedding", "output.weight": "head"}
_LEADING = 0.2


@dataclass(frozen=True)
class _Matrix:
    role: str
    kind: GGMLQuantizationType
    tensor: ReaderTensor


def read(file: Path, resident_bytes: int | None = None) -> Evidence:
    """The evidence of a GGUF file: a row for each type and role, zeros of the matrices inside the blocks and of the head.

    Args:
        resident_bytes: What the loaded tensors take. Where an embedding is the head too, this tells whether llama.cpp made a
            second copy of it, in an order of blocks that suits the product.
    """
    groups: dict[tuple[str, str], list[_Matrix]] = defaultdict(list)
    reader = GGUFReader(file)
    for tensor in reader.tensors:
        kind = GGMLQuantizationType(tensor.tensor_type)
        groups[_role(tensor), kind.name].append(_Matrix(_role(tensor), kind, tensor))
    layers = [_layer(matrices) for matrices in groups.values()]
    parameters = sum(layer.parameters for layer in layers)
    layers += _copied_head(groups, sum(layer.bytes for layer in layers), resident_bytes)
    linear = [layer for layer in layers if layer.role == "linear"]
    weights = sum(layer.parameters for layer in linear)
    by_type = Counter({layer.layer: layer.parameters for layer in linear})
    return Evidence(
        weight_bytes=sum(layer.bytes for layer in layers),
        parameters=parameters,
        blocks=_header(reader, f"{_header(reader, 'general.architecture')}.block_count"),
        effective_bits=8 * sum(layer.bytes for layer in linear) / weights if weights else None,
        sparsity=sum((layer.zeros or 0.0) * layer.parameters for layer in linear) / weights if weights else None,
        layers=layers,
        kernel="llama.cpp " + " + ".join(name for name, count in by_type.most_common() if count >= _LEADING * weights),
    )


def _header(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return field and field.contents()


def _copied_head(groups: dict[tuple[str, str], list[_Matrix]], file_bytes: int, resident_bytes: int | None) -> list[LayerEvidence]:
    """The row of a head that is a copy of the embedding, where there is one."""
    if resident_bytes is None or any(role == "head" for role, _ in groups):
        return []
    embedding = next(matrices[0] for (role, _), matrices in groups.items() if role == "embedding")
    if resident_bytes - file_bytes < embedding.tensor.n_bytes / 2:
        return []
    return [_layer([_Matrix("head", embedding.kind, embedding.tensor)])]


def _role(tensor: ReaderTensor) -> str:
    if len(tensor.shape) < 2:
        return "other"
    return _ROLES.get(tensor.name, "linear")


def _layer(matrices: list[_Matrix]) -> LayerEvidence:
    role, kind = matrices[0].role, matrices[0].kind
    parameters = sum(int(m.tensor.n_elements) for m in matrices)
    size = sum(int(m.tensor.n_bytes) for m in matrices)
    found = LayerEvidence(
        layer=f"ggml {kind.name}",
        role=role,
        count=len(matrices),
        parameters=parameters,
        bytes=size,
        dtypes={kind.name: size},
        bits_per_weight=8 * size / parameters,
    )
    if role in ("linear", "head"):
        _add_zeros(found, matrices)
        found.compute = {_COMPUTE.get(kind, "int8"): len(matrices)}
    return found


def _add_zeros(found: LayerEvidence, matrices: list[_Matrix]) -> None:
    """Fraction and patterns of the zeros of dequantized matrices."""
    import torch

    from slimbench.harness.measure.zeros import zeros

    probed = [zeros(torch.from_numpy(dequantize(m.tensor.data, m.kind).copy())) for m in matrices]
    patterns = Counter(z.pattern for z in probed)
    weights = [int(m.tensor.n_elements) for m in matrices]
    found.zeros = sum(z.fraction * count for z, count in zip(probed, weights, strict=True)) / found.parameters
    found.pattern = next(iter(patterns)) if len(patterns) == 1 else None
    found.patterns = {pattern: count for pattern, count in patterns.most_common() if pattern}
