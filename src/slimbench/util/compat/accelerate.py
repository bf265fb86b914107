"""accelerate: weights that lie elsewhere."""

from __future__ import annotations

from typing import Any


def device_hook(module: Any) -> Any:
    """The hook by which accelerate brings the weights of a module in, or None."""
    return getattr(module, "_hf_hook", None)
