"""llmcompressor: on which device it works, and what it says went wrong."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Let llmcompressor work where a model is and pin activations for a card alone; by itself it takes any accelerator, and always pins."""
    from llmcompressor.pipelines.cache import IntermediatesCache
    from llmcompressor.pipelines.sequential import pipeline

    main_device, pin = pipeline.get_main_device, vars(IntermediatesCache)["_pin_intermediate"]
    pipeline.get_main_device = lambda: device
    if device.type != "cuda":
        IntermediatesCache._pin_intermediate = classmethod(lambda cls, value: None)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        pipeline.get_main_device = main_device
        IntermediatesCache._pin_intermediate = pin  # type: ignore[method-assign]


def failed_inverses(warnings: list[str]) -> int:
    """Layers whose Hessian a sparsifier could not invert, so that it took the identity in its place."""
    return sum("invert hessian" in warning.lower() for warning in warnings)


def rounded_without_hessian(warnings: list[str]) -> int:
    """Layers that GPTQ rounded to nearest because it could not invert their Hessians; the modifier forgets them as it ends."""
    found = [match for warning in warnings if (match := re.search(r"Hessian inversion failed for (\d+)/\d+ modules", warning))]
    return max((int(match[1]) for match in found), default=0)
