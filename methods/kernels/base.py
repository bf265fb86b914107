"""What a kernel is: one way to compute the product of inputs with a quantized weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from slimbench.methods.kernels.grid import QuantizedWeight


class Kernel(ABC):
    """Whether it takes a weight, what it keeps of it in memory, and how it multiplies. Outliers and biases are not its concern."""

    name: ClassVar[str]
    pattern: ClassVar[str | None] = None
    """The zeros that a weight must have for it, as `harness.measure.zeros` names them."""

    @classmethod
    @abstractmethod
    def accepts(cls, weight: QuantizedWeight) -> bool:
        """Whether the kernel computes this weight."""

    @classmethod
    def missing(cls) -> str | None:
        """Why the kernel cannot be had on this machine, in one line; None where it can."""
        return None

    @classmethod
    def build(cls) -> str | None:
        """What its code is compiled for on this machine, in one line; None for kernels of libraries."""
        return None

    @classmethod
    @abstractmethod
    def prepare(cls, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Buffers to keep, by name."""

    @classmethod
    @abstractmethod
    def multiply(cls, layer: Any, x: Tensor) -> Tensor:
        """x [rows, in] times the weight: [rows, out], without the bias."""

    @classmethod
    @abstractmethod
    def restore(cls, layer: Any) -> QuantizedWeight:
        """The weight on its grid again, from the buffers."""

    @classmethod
    def rows(cls, layer: Any, index: Tensor) -> Tensor:
        """Some rows of the weight, dequantized: [n, in] for an index [n]. Kernels whose layout allows it unpack no others."""
        return cls.restore(layer).take(index).dequantize()
