"""What was really loaded: layer classes, bytes, bits, zeros, and the operators of one decode step.

A claim is never trusted: libraries have been seen to prune nothing, to store sixteen bits for four, and to expand
weights to dense in the first forward pass. Everything here is read from the module in memory.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness.record import Evidence, LayerEvidence

_PRODUCTS = ("mm", "matmul", "linear", "gemm", "gemv", "dequant", "bmm")
_NESTING = 3


def collect(module: Any, decode_step: Callable[[], Any]) -> Evidence:
    """Read the evidence of a loaded module.

    Args:
        module: A causal language model; its leaf modules hold the weights.
        decode_step: Runs one decode step; called twice, since some libraries repack in the first.
    """
    decode_step()
    operators, materialised = _observe(module, decode_step)
    layers, counted = _layers(module)
    linear = [layer for layer in layers if layer.role == "linear"]
    weights = sum(layer.parameters for layer in linear)
    probed = [layer for layer in linear if layer.zeros is not None]
    probed_weights = sum(layer.parameters for layer in probed)
    return Evidence(
        weight_bytes=sum(layer.bytes for layer in layers),
        parameters=counted,
        effective_bits=8 * sum(layer.bytes for layer in linear) / weights if weights else None,
        sparsity=sum((layer.zeros or 0) * layer.parameters for layer in probed) / probed_weights if probed_weights else None,
        layers=layers,
        kernel=_kernel(operators),
        operators=dict(operators.most_common(12)),
        materialised_bytes=materialised,
    )


def flags(claim: dict[str, Any], evidence: Evidence) -> list[str]:
    """One line for each point in which claim and evidence differ."""
    found: list[str] = []
    bits, stored = claim.get("bits"), evidence.effective_bits
    if bits is not None and stored is not None and not claim.get("simulated"):
        overhead = 48 / claim["group_size"] if claim.get("group_size") else 0.5
        if stored > bits + overhead:
            found.append(f"claims {bits:g} bits, stores {stored:.1f}")
    sparsity, zeros = claim.get("sparsity"), evidence.sparsity
    if sparsity is not None and zeros is not None and zeros < sparsity - 0.01:
        found.append(f"claims {sparsity:.0%} zeros, has {zeros:.0%}")
    pattern = claim.get("pattern")
    if pattern is not None:
        broken = [x for x in evidence.layers if x.role == "linear" and x.zeros is not None and x.pattern != pattern]
        found += [f"{pattern} mask does not hold in {sum(x.count for x in broken)} layers"] if broken else []
        found += [f"{pattern} mask without a sparse kernel"] if evidence.kernel and "sparse" not in evidence.kernel else []
    if claim.get("simulated"):
        found.append("simulated: rounded numbers in dense storage")
    if evidence.materialised_bytes and bits is not None:
        found.append(f"dequantizes to dense on every step ({evidence.materialised_bytes / 1e6:.0f} MB written)")
    return found


def resident_tensors(owner: Any, depth: int = _NESTING) -> Iterator[torch.Tensor]:
    """Every tensor that an object holds: parameters, buffers, and those inside attributes such as a quantization state."""
    if isinstance(owner, torch.Tensor):
        yield owner
        values = list(vars(owner).values()) if getattr(owner, "__dict__", None) else []
    elif isinstance(owner, torch.nn.Module):
        values = [*owner._parameters.values(), *owner._buffers.values()]
        values += [v for k, v in vars(owner).items() if k not in ("_parameters", "_buffers", "_modules")]
    elif isinstance(owner, dict):
        values = list(owner.values())
    elif isinstance(owner, list | tuple):
        values = list(owner)
    elif hasattr(owner, "__dict__") and not callable(owner):
        values = list(vars(owner).values())
    else:
        return
    if depth:
        for value in values:
            if not isinstance(value, torch.nn.Module | type):
                yield from resident_tensors(value, depth - 1)


def _layers(module: torch.nn.Module) -> tuple[list[LayerEvidence], int]:
    find_head: Any = getattr(module, "get_output_embeddings", None)
    head = find_head() if find_head else None
    seen: set[int] = set()
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for _, layer in module.named_modules():
        fresh: list[torch.Tensor] = []
        for tensor in resident_tensors(layer):
            pointer = tensor.untyped_storage().data_ptr() if tensor.device.type != "meta" else 0
            if pointer and pointer not in seen:
                seen.add(pointer)
                fresh.append(tensor)
        role = _role(layer, layer is head)
        if not fresh and role == "other":
            continue
        groups[type(layer).__name__, role].append(_describe(layer, role, fresh))
    layers = [_merge(name, role, found) for (name, role), found in groups.items()]
    return layers, sum(layer.parameters for layer in layers)


def _role(layer: torch.nn.Module, is_head: bool) -> str:
    if is_head:
        return "head"
    if isinstance(layer, torch.nn.Embedding):
        return "embedding"
    if isinstance(getattr(layer, "in_features", None), int) and isinstance(getattr(layer, "out_features", None), int):
        return "linear"
    return "other"


def _describe(layer: Any, role: str, tensors: list[torch.Tensor]) -> dict[str, Any]:
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.untyped_storage().nbytes()
    if role == "linear" or (role == "head" and tensors):
        parameters = layer.in_features * layer.out_features
    else:
        parameters = sum(t.numel() for t in tensors if isinstance(t, torch.nn.Parameter))
    zeros = pattern = None
    if role == "linear" and (weight := _effective_weight(layer)) is not None:
        zeros = float((weight == 0).float().mean())
        pattern = "2:4" if zeros >= 0.5 - 1e-6 and _holds_2_of_4(weight) else None
    return {"parameters": parameters, "dtypes": sizes, "zeros": zeros, "pattern": pattern}


def _merge(name: str, role: str, found: list[dict[str, Any]]) -> LayerEvidence:
    parameters = sum(f["parameters"] for f in found)
    dtypes: Counter[str] = sum((f["dtypes"] for f in found), Counter())
    total = sum(dtypes.values())
    probed = [f for f in found if f["zeros"] is not None]
    weights = sum(f["parameters"] for f in probed)
    return LayerEvidence(
        layer=name,
        role=role,
        count=len(found),
        parameters=parameters,
        bytes=total,
        dtypes=dict(dtypes),
        bits_per_weight=8 * total / parameters if parameters else 0.0,
        zeros=sum(f["zeros"] * f["parameters"] for f in probed) / weights if weights else None,
        pattern="2:4" if probed and all(f["pattern"] == "2:4" for f in probed) else None,
    )


def _effective_weight(layer: Any) -> torch.Tensor | None:
    """The weight matrix [out, in] that a layer stands for, None where it cannot be read without running the layer."""
    if hasattr(layer, "dequantize"):
        return layer.dequantize()
    weight = getattr(layer, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.shape == (layer.out_features, layer.in_features):
        return weight.detach()
    return None


def _holds_2_of_4(weight: torch.Tensor) -> bool:
    if weight.shape[1] % 4:
        return False
    return bool(((weight.reshape(-1, 4) == 0).sum(1) >= 2).all())


class _Observer(TorchDispatchMode):
    """Counts operators and the bytes of new tensors that have the shape of a weight matrix."""

    def __init__(self, shapes: set[tuple[int, ...]], known: set[int]) -> None:
        super().__init__()
        self.shapes, self.known = shapes, known
        self.operators: Counter[str] = Counter()
        self.materialised = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").split(".")[0]
        if any(word in name for word in _PRODUCTS):
            self.operators[name] += 1
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tuple(tensor.shape) in self.shapes:
                pointer = tensor.untyped_storage().data_ptr()
                if pointer not in self.known:
                    self.materialised += tensor.untyped_storage().nbytes()
        return out


def _observe(module: torch.nn.Module, decode_step: Callable[[], Any]) -> tuple[Counter[str], int]:
    shapes: set[tuple[int, ...]] = set()
    known: set[int] = set()
    layer: Any
    for layer in module.modules():
        if _role(layer, False) == "linear":
            shapes |= {(layer.out_features, layer.in_features), (layer.in_features, layer.out_features)}
        known |= {t.untyped_storage().data_ptr() for t in resident_tensors(layer) if t.device.type != "meta"}
    observer = _Observer(shapes, known)
    with observer:
        decode_step()
    return observer.operators, observer.materialised


def _kernel(operators: Counter[str]) -> str | None:
    """The operators that did at least a fifth of the products of the step, most frequent first."""
    total = sum(operators.values())
    leading = [name for name, count in operators.most_common() if count >= total / 5]
    return " + ".join(leading) or None
