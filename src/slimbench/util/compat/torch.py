"""torch: operators without a public name, calls past a dispatch mode, and what a module keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = ["TorchDispatchMode", "attributes", "buffers", "redispatch", "tree_iter"]

int_mm = torch._int_mm
"""int8 [n, in] times int8 [in, out] into int32; on a card n is more than 16."""
scaled_mm = torch._scaled_mm
"""e4m3 times e4m3 with a scale for each row (`scale_a`) and column (`scale_b`); on a card."""
weight_int8pack_mm = torch._weight_int8pack_mm
"""bfloat16 [n, in] times int8 [out, in] with one scale a row [out]; on a CPU."""
pack_int4_cpu = torch.ops.aten._convert_weight_to_int4pack_for_cpu
weight_int4pack_mm_cpu = torch.ops.aten._weight_int4pack_mm_for_cpu
"""bfloat16 [n, in] times packed codes with groups' scales and offsets [in / group, out, 2]; on a CPU."""
pack_int4 = torch.ops.aten._convert_weight_to_int4pack
weight_int4pack_mm = torch.ops.aten._weight_int4pack_mm
"""The same on a card."""


def redispatch(function: Any, device_type: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """Call an operator's implementation for a device, `cpu` or `cuda`, so that the operators inside it are dispatched again."""
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device_type.upper()))
    return function.redispatch(key, *args, **kwargs)


def buffers(module: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    """The buffers of a module itself by name; reading them here is many times faster than as attributes."""
    return module._buffers


def attributes(module: torch.nn.Module) -> list[Any]:
    """What a module itself holds besides parameters, buffers and modules."""
    return [value for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")]
