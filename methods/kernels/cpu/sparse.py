"""The own CPU kernel for sparse weights: `slimbench::sparse_mm` (see `sparse_mm.cpp`)."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from slimbench.methods.kernels.cpu import library
from slimbench.methods.kernels.cpu.library import NotBuilt

NAME = "slimbench sparse_mm"
SOURCE = Path(__file__).with_name("sparse_mm.cpp")
_DTYPES = (torch.bfloat16, torch.float32)


def accepts(values: Tensor) -> bool:
    """Whether the kernel computes with stored weights of this dtype on this device."""
    return values.device.type == "cpu" and values.dtype in _DTYPES


@functools.cache
def missing() -> str | None:
    """Why the operator cannot be had here, in one line; None once it is compiled, or found in the cache, and registered."""
    try:
        library.load(SOURCE)
    except (NotBuilt, OSError) as error:
        return " ".join(str(error).split())
    torch.library.register_fake("slimbench::sparse_mm", _shape)
    return None


def _shape(x: Tensor, bits: Tensor, starts: Tensor, values: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], bits.shape[0])
