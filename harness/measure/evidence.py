"""What was really loaded: layer classes, bytes, bits, zeros, and the operators of one decode step.

A claim is never trusted: libraries have been seen to prune nothing, to store sixteen bits for four, and to expand
weights to dense in the first forward pass. Everything here is read from the module in memory; weights that lie outside it between
calls are brought in one layer at a time, as a call does, and are counted apart (`offloaded_bytes`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.sparse import SparseSemiStructuredTensor

from slimbench.harness.measure import operators
from slimbench.harness.measure.offloaded import brought_in
from slimbench.harness.measure.zeros import Zeros, joined, zeros
from slimbench.harness.schema.evidence import Evidence, LayerEvidence
from slimbench.util.compat.torch import attributes

_NESTING = 3
_DENSE_BITS = 16
_ROW = "row of "
_PRODUCTS = ("linear", "head", "draft")


def collect(module: Any, decode_step: Callable[[], Any]) -> Evidence:
    """Read the evidence of a loaded module.

    Args:
        module: A causal language model; its leaf modules hold the weights.
        decode_step: Runs one decode step; called several times, since some libraries repack in the first.
    """
    loaded_bits = linear_bits(module)
    decode_step()
    found = _layers(module)
    tensors = [tensor for layer in module.modules() for tensor in resident_tensors(layer)]
    resident = {operators.storage_pointer(tensor) for tensor in tensors}
    step = operators.observe([layer.module for layer in found if layer.role in _PRODUCTS], resident, decode_step)
    layers = _merge(found, step)
    linear = [layer for layer in layers if layer.role == "linear"]
    weights = sum(layer.parameters for layer in linear)
    probed = [layer for layer in linear if layer.zeros is not None]
    probed_weights = sum(layer.parameters for layer in probed)
    offloaded = sum(layer.offloaded for layer in found)
    return Evidence(
        weight_bytes=sum(layer.bytes for layer in layers) - offloaded,
        offloaded_bytes=offloaded,
        parameters=sum(layer.parameters + layer.biases for layer in found),
        blocks=_blocks(module, step),
        effective_bits=8 * sum(layer.bytes for layer in linear) / weights if weights else None,
        loaded_bits=loaded_bits,
        sparsity=sum((layer.zeros or 0) * layer.parameters for layer in probed) / probed_weights if probed_weights else None,
        layers=layers,
        kernel=_kernel(found, step),
        operators=dict(step.operators.most_common(12)),
        kernels=operators.device_kernels(decode_step, next((t.device for t in tensors if not t.is_meta), torch.device("cpu"))),
        missing_kernels=sorted({reason for layer in module.modules() if (reason := getattr(layer, "kernel_missing", None))}),
        materialised_bytes=sum(step.layers[id(x.module)].expanded_bytes for x in found if x.fell_back(step)),
    )


@dataclass(frozen=True)
class _Layer:
    """One leaf of the module tree: what it holds, what its weights are, and how it multiplied."""

    module: torch.nn.Module
    role: str
    parameters: int
    biases: int
    dtypes: Counter[str]
    zeros: Zeros | None
    offloaded: int

    @property
    def bytes(self) -> int:
        return self.dtypes.total()

    def fell_back(self, step: operators.Step) -> bool:
        """Whether it holds less than 16 bits a weight and multiplied with a dense weight made on the spot."""
        run = step.layers.get(id(self.module))
        packed = self.role in _PRODUCTS and 8 * self.bytes < _DENSE_BITS * self.parameters
        return packed and run is not None and run.expanded >= self.parameters

    def operator(self, step: operators.Step) -> str | None:
        """The operators of its product, None where it did not run."""
        run = step.layers.get(id(self.module))
        if run is None:
            return None
        name = " + ".join(dict.fromkeys(run.products)) or operators.UNSEEN
        return f"dequantize + {name}" if self.fell_back(step) else name


def resident_tensors(owner: Any, depth: int = _NESTING) -> Iterator[torch.Tensor]:
    """Every tensor that an object holds: parameters, buffers, and those inside attributes such as a quantization state."""
    if isinstance(owner, torch.Tensor):
        yield owner
        inner = owner.__tensor_flatten__()[0] if hasattr(owner, "__tensor_flatten__") else []
        values = [*(vars(owner).values() if getattr(owner, "__dict__", None) else []), *(getattr(owner, name) for name in inner)]
    elif isinstance(owner, torch.nn.Module):
        values = [*owner.parameters(recurse=False), *owner.buffers(recurse=False), *attributes(owner)]
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


def _layers(module: torch.nn.Module) -> list[_Layer]:
    return [_describe(*holding) for holding in _holdings(module)]


def products(module: torch.nn.Module) -> list[tuple[torch.nn.Module, int]]:
    """The layers that multiply, the head among them, each with the number of weights that it stands for."""
    layers = [layer for layer, role in _roles(module) if role in _PRODUCTS and hasattr(layer, "in_features")]
    return [(layer, layer.in_features * layer.out_features) for layer in layers]


def experts(module: torch.nn.Module) -> list[tuple[torch.nn.Module, int, int]]:
    """The layers that hold the matrices of several experts, each with their number and the weights of one.

    Other layers hold stacks of matrices too, such as those of a policy, and are sent no tokens.
    """
    held = [(layer, _stacks(layer)) for layer, role in _roles(module) if role in _PRODUCTS]
    sent = [(layer, stacks) for layer, stacks in held if stacks and getattr(layer, "num_experts", None) == len(stacks[0])]
    return [(layer, len(stacks[0]), sum(stack[0].numel() for stack in stacks)) for layer, stacks in sent]


def bytes_of(layer: torch.nn.Module) -> int:
    """Bytes of the tensors of a layer as a call has them: those that it shares with others, and those that lie elsewhere between calls."""
    with brought_in(layer):
        held = {operators.storage_pointer(tensor): tensor.untyped_storage().nbytes() for tensor in resident_tensors(layer)}
    return sum(size for pointer, size in held.items() if pointer)


def linear_bits(module: torch.nn.Module) -> float | None:
    """Bits per weight of the linear layers as they lie in memory now, None without such layers."""
    linear = [holding for holding in _holdings(module) if holding[1] == "linear"]
    weights = sum(_parameters(layer, role, tensors) for layer, role, tensors, _ in linear)
    return 8 * sum(t.untyped_storage().nbytes() for _, _, tensors, _ in linear for t in tensors) / weights if weights else None


def _holdings(module: torch.nn.Module) -> Iterator[tuple[Any, str, list[torch.Tensor], Container[int]]]:
    """The layers that hold tensors of their own, with role, those tensors, and which of them lie outside the module.

    Memory shared with an earlier layer counts there.
    """
    seen: set[Hashable] = set()
    for layer, role in _roles(module):
        with brought_in(layer) as elsewhere:
            fresh: list[torch.Tensor] = []
            for tensor in resident_tensors(layer):
                pointer = operators.storage_pointer(tensor)
                place = elsewhere.get(pointer, pointer)
                if pointer and place not in seen:
                    seen.add(place)
                    fresh.append(tensor)
            if fresh or role in ("head", "embedding"):
                yield layer, role, fresh, elsewhere


def _roles(module: torch.nn.Module) -> Iterator[tuple[Any, str]]:
    """The modules of a model with their roles; what multiplies inside the blocks of the `draft` that it holds has one of its own."""
    draft = getattr(module, "draft", None)
    guessing = set() if draft is None else set(draft.modules())
    finders = [getattr(owner, "get_output_embeddings", None) for owner in (module, draft)]
    heads = {head for find in finders if find and (head := find()) is not None}
    for layer in module.modules():
        role = "head" if layer in heads else _role(layer)
        yield layer, "draft" if role == "linear" and layer in guessing else role


def _role(layer: torch.nn.Module) -> str:
    if isinstance(layer, torch.nn.Embedding):
        return "embedding"
    if isinstance(getattr(layer, "in_features", None), int) and isinstance(getattr(layer, "out_features", None), int):
        return "linear"
    return "linear" if _stacks(layer) else "other"


def _stacks(layer: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters of a layer that is no linear one which hold many matrices, as experts do: [experts, out, in], or turned if it says so."""
    if hasattr(layer, "in_features"):
        return []
    held = [p for p in layer.parameters(recurse=False) if sum(size > 1 for size in p.shape) > 2]
    return [p.mT if getattr(layer, "is_transposed", False) else p for p in held]


def _parameters(layer: Any, role: str, tensors: list[torch.Tensor]) -> int:
    """Weights that a layer stands for, of which `tensors` are what lies in its memory."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, torch.nn.Parameter) and operators.storage_pointer(weight) and not any(tensor is weight for tensor in tensors):
        tensors = [] if role in _PRODUCTS else tensors  # the weight counts where it was met first
    if role in _PRODUCTS and tensors and not _stacks(layer):
        return layer.in_features * layer.out_features
    return sum(t.numel() for t in tensors if isinstance(t, torch.nn.Parameter))


def _biases(layer: Any, role: str, tensors: list[torch.Tensor]) -> int:
    """Parameters of a layer that multiplies nothing with its inputs but adds to its outputs; `_parameters` counts those of other layers."""
    bias = getattr(layer, "bias", None)
    return bias.numel() if role in _PRODUCTS and tensors and not _stacks(layer) and isinstance(bias, torch.Tensor) else 0


def _blocks(module: torch.nn.Module, step: operators.Step) -> int | None:
    """Decoder blocks that ran in the step: members of the list of modules with the most of them; None without such a list."""
    ran = [sum(any(id(layer) in step.layers for layer in member.modules()) for member in layers) for layers in _outermost_lists(module)]
    return max(ran, default=None)


def _outermost_lists(module: torch.nn.Module) -> Iterable[torch.nn.ModuleList]:
    """Lists of modules that stand in no other such list, as experts do in a block."""
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)


def _describe(layer: Any, role: str, tensors: list[torch.Tensor], elsewhere: Container[int]) -> _Layer:
    dtypes: Counter[str] = Counter()
    for tensor in tensors:
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.untyped_storage().nbytes()
    found = [(zeros(weight), weight.numel()) for weight in _effective_weights(layer, role)] if tensors else []
    offloaded = sum(t.untyped_storage().nbytes() for t in tensors if operators.storage_pointer(t) in elsewhere)
    parameters = _parameters(layer, role, tensors)
    return _Layer(layer, role, parameters, _biases(layer, role, tensors), dtypes, joined(found) if found else None, offloaded)


def _effective_weights(layer: Any, role: str) -> list[torch.Tensor]:
    """The weight matrix that a layer stands for; those of experts one below the other; none that cannot be read without running it."""
    if role == "other":
        return []
    if hasattr(layer, "dequantize"):
        return [layer.dequantize()]
    if stacks := _stacks(layer):
        return [stack.detach().flatten(0, -2) for stack in stacks]
    shape = (layer.num_embeddings, layer.embedding_dim) if role == "embedding" else (layer.out_features, layer.in_features)
    weight = getattr(layer, "weight", None)
    if isinstance(weight, SparseSemiStructuredTensor):
        return [weight.to_dense()]
    return [weight.detach()] if isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.shape == shape else []


def _merge(found: list[_Layer], step: operators.Step) -> list[LayerEvidence]:
    groups: dict[tuple[str, str], list[_Layer]] = defaultdict(list)
    for layer in found:
        groups[type(layer.module).__name__, layer.role].append(layer)
    return [_class(name, role, layers, step) for (name, role), layers in groups.items()]


def _class(name: str, role: str, layers: list[_Layer], step: operators.Step) -> LayerEvidence:
    parameters = sum(layer.parameters for layer in layers)
    dtypes: Counter[str] = sum((layer.dtypes for layer in layers), Counter())
    probed = [(layer.zeros, layer.parameters) for layer in layers if layer.zeros is not None]
    weights = sum(count for _, count in probed)
    patterns = Counter(z.pattern for z, _ in probed)
    runs = [step.layers[id(layer.module)] for layer in layers if id(layer.module) in step.layers]
    return LayerEvidence(
        layer=name,
        role=role,
        count=len(layers),
        parameters=parameters,
        bytes=dtypes.total(),
        dtypes=dict(dtypes),
        bits_per_weight=8 * dtypes.total() / parameters if parameters else 0.0,
        zeros=sum(z.fraction * count for z, count in probed) / weights if weights else None,
        pattern=next(iter(patterns)) if len(patterns) == 1 else None,
        patterns={pattern: count for pattern, count in patterns.most_common() if pattern},
        compute=dict(Counter(run.dtype for run in runs if run.dtype)),
        operators=dict(Counter(operator for layer in layers if (operator := layer.operator(step)))),
        scales=dict(sum((_scales(layer.module) for layer in layers), Counter())),
        fallback_layers=sum(layer.fell_back(step) for layer in layers),
    )


def _scales(layer: Any) -> Counter[str]:
    """Scales of a layer that tells how many a row has, by the weights that share one; nothing of others."""
    groups, inputs = getattr(layer, "groups", None), getattr(layer, "in_features", None)
    if not isinstance(groups, int) or not isinstance(inputs, int):
        return Counter()
    return Counter({f"{_ROW}{inputs}" if groups == 1 else str(inputs // groups): layer.out_features * groups})


def _kernel(found: list[_Layer], step: operators.Step) -> str | None:
    """The operators that multiplied with at least a fifth of the weights inside the blocks, the heaviest first."""
    weights: Counter[str] = Counter()
    for layer in found:
        if layer.role == "linear" and (operator := layer.operator(step)):
            weights[operator] += layer.parameters
    counted = weights or step.operators
    leading = [name for name, count in counted.most_common() if count >= counted.total() / 5]
    return " + ".join(leading) or None
