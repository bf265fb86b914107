"""What a policy need not tell: all tensors that stay of a text, whatever its cache says, and products that no layer was called for."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from slimbench.harness.measure.dynamic.hooks import counted
from slimbench.harness.measure.loaded import Generates
from slimbench.harness.measure.operators import storage_pointer
from slimbench.util.compat.torch import TorchDispatchMode, buffers

_SLACK, _SMALL = 1.05, 1 << 12
_STEPS = 2


def uncalled(model: Any, prompt: torch.Tensor) -> str | None:
    """A flag where a step multiplies more by weights than the calls of layers say, by torch's own count of products of two matrices.

    Of products in batches, which attention has too, those with a tensor of the model's own count. Products of packed weights are
    operators of their own, which torch does not count.

    Args:
        prompt: Token ids, int64 [1, T].
    """
    step = model.prefill(prompt, _STEPS + 1)
    with counted(model.module) as count, _Batched(model.module) as batched, FlopCounterMode(display=False) as counter:
        for _ in range(_STEPS):
            step = model.decode_step(step)
    found = counter.get_flop_counts().get("Global", {})
    ran = sum(found.get(operator, 0) for operator in (torch.ops.aten.mm, torch.ops.aten.addmm)) // 2 + batched.products
    return f"multiplies by {ran:,} weights, of which layers were called for {count.products:,}" if ran > _SLACK * count.products else None


class _Batched(TorchDispatchMode):
    """Multiplications by a model's own tensors in products of matrices in batches, as they come to it decomposed."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        own = (tensor for layer in module.modules() for tensor in (*layer.parameters(recurse=False), *buffers(layer).values()))
        self._own = {storage_pointer(tensor) for tensor in own if tensor is not None}
        self.products = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            left, right = args[-2:]
            if {storage_pointer(left), storage_pointer(right)} & self._own:
                self.products += left.numel() * right.shape[-1]
        return function(*args, **(kwargs or {}))


def untold(model: Generates, prompt: torch.Tensor) -> str | None:
    """A flag where more stays of a text than is told; None otherwise, and where the engine does not show its cache.

    What a first text leaves for all later ones, such as tables, counts if no text went through the model before.

    Args:
        prompt: Token ids, int64 [1, T].
    """
    gc.collect()
    before = _storages()
    step = model.prefill(prompt, _STEPS + 1)
    for _ in range(_STEPS):
        step = model.decode_step(step)
    gc.collect()
    stays = sum(size for place, size in _storages().items() if before.get(place) != size)
    told = model.cache_bytes(step.state)
    if told is None or stays <= _SLACK * told + _SMALL:
        return None
    return f"holds {stays / 1e6:.2f} MB of a text, and tells {told / 1e6:.2f} MB"


def _storages() -> dict[int, int]:
    """Bytes of each storage of a tensor that Python knows."""
    found = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    return {place: one.untyped_storage().nbytes() for one in found if (place := storage_pointer(one))}
