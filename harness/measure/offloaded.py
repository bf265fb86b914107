"""Weights that `accelerate` keeps outside a module, on disk or in host memory: brought in to be read, as each call of a layer does."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from slimbench.harness.measure.operators import storage_pointer
from slimbench.util.compat.accelerate import device_hook


@contextmanager
def brought_in(layer: Any) -> Iterator[dict[int, Hashable]]:
    """The weights of one layer in memory while the context lasts; nothing to do for a layer that keeps its own.

    Yields:
        Where each of them lies otherwise, by the storage pointer that it has meanwhile. Tied weights lie in one place; the pointers
        of different layers may be equal, since memory is used again.
    """
    hook = device_hook(layer)
    if not getattr(hook, "offload", False) or hook.place_submodules:
        yield {}
        return
    from accelerate.utils import named_module_tensors

    hook.pre_forward(layer)
    try:
        tensors = named_module_tensors(layer, include_buffers=hook.offload_buffers, remove_non_persistent=True)
        yield {storage_pointer(tensor): _place(hook.weights_map, name) for name, tensor in tensors}
    finally:
        hook.post_forward(layer, None)


def _place(weights: Any, name: str) -> Hashable:
    """The file and the name in it, or the address in host memory."""
    entry = getattr(weights.dataset, "index", {}).get(weights.prefix + name)
    return (entry["safetensors_file"], entry["weight_name"]) if entry else storage_pointer(weights[name])
