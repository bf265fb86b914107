"""Compiles the CPU kernel for this processor on first use, and registers its operators: `slimbench::packed_mm` and, for several
weights with the same inputs, `slimbench::packed_mm_shared`."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from slimbench.methods.kernels.cpu import library
from slimbench.methods.kernels.cpu.library import NotBuilt

SOURCE = Path(__file__).with_name("packed_mm.cpp")


@functools.cache
def missing() -> str | None:
    """Why the operator cannot be had here, in one line; None once it is compiled, or found in the cache, and registered."""
    try:
        library.load(SOURCE)
    except (NotBuilt, OSError) as error:
        return " ".join(str(error).split())
    torch.library.register_fake("slimbench::packed_mm", _shape)
    torch.library.register_fake("slimbench::packed_mm_shared", _shapes)
    return None


def compiled_for() -> str:
    """Flags of the compiler, and the instructions by which the operator multiplies integers."""
    return f"{' '.join(library.FLAGS)}: {torch.ops.slimbench.packed_mm_instructions()}"


def _shape(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None, bits: int, outputs: int
) -> torch.Tensor:
    return x.new_empty(x.shape[0], outputs)


def _shapes(
    x: torch.Tensor,
    codes: list[torch.Tensor],
    scales: list[torch.Tensor],
    offsets: list[torch.Tensor | None],
    bits: list[int],
    outputs: list[int],
) -> list[torch.Tensor]:
    return [x.new_empty(x.shape[0], width) for width in outputs]
