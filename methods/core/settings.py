"""Settings that stand in many methods, with what is checked of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slimbench.methods.base import Method, ModelShape, Unsupported
from slimbench.methods.core.masks import check_pattern, check_sparsity


@dataclass(frozen=True, kw_only=True)
class Grouped(Method):
    """A method whose weights share scales in groups.

    Attributes:
        group_size: Consecutive inputs that share one scale; must divide the input features. None, where it may be, for one scale a row.
    """

    group_size: Literal[32, 64, 128, 256] | None = 64

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        if self.group_size:
            shape.check_group(self.group_size)


@dataclass(frozen=True, kw_only=True)
class Coded(Method):
    """A method that writes a code for each weight; those of a row fill bytes.

    Attributes:
        bits: Bits of a code, before scales and tables.
    """

    bits: int = 4

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        check_codes(shape, self.bits)


@dataclass(frozen=True, kw_only=True)
class FittedGrid(Method):
    """A method that fits its grids itself, so that there are grids which it has not.

    Attributes:
        symmetric: Centre the grid on zero; None: it has offsets.
        clip: False asks for ranges from the smallest to the largest weight, with which nothing is left to fit; None fits them.
    """

    symmetric: Literal[True] | None = None
    clip: Literal[False] | None = None

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        if self.clip is False:
            raise Unsupported(
                f"{self.name} is what fits ranges: with those from the smallest to the largest weight it is rounding to nearest"
            )


@dataclass(frozen=True, kw_only=True)
class SecondOrder(Method):
    """A method that rounds or prunes by the second moments of the inputs, the Hessian of a layer's squared error.

    Attributes:
        dampening: Added to the Hessian's diagonal, as a fraction of its mean.
    """

    dampening: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dampening <= 0:
            raise ValueError(f"dampening must be positive, not {self.dampening}")


@dataclass(frozen=True, kw_only=True)
class Sparse(Method):
    """A method that sets weights to zero.

    Attributes:
        sparsity: Fraction of the weights that becomes zero, above 0 and below 1; with a pattern the one that it implies.
        pattern: `n:m` puts n zeros into each m consecutive inputs; None leaves the choice free.
    """

    sparsity: float = 0.5
    pattern: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsity(self.sparsity, self.pattern)

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        check_pattern(shape, self.pattern)


@dataclass(frozen=True, kw_only=True)
class Smaller(Method):
    """A method that takes parameters away.

    Attributes:
        ratio: Share that goes, above 0 and below 1; of what, the method says.
    """

    ratio: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio must be between 0 and 1, both excluded, not {self.ratio}")


@dataclass(frozen=True, kw_only=True)
class Adapters(Method):
    """A method that trains low-rank adapters.

    Attributes:
        rank: Of the adapters.
        alpha: The adapters are scaled by alpha / rank.
    """

    draws = True

    rank: int = 16
    alpha: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be positive, not {self.alpha}")


def check_codes(shape: ModelShape, bits: int) -> None:
    """Raise `Unsupported` unless a code of so many bits for each input of a layer fills bytes.

    A code is stored in fields whose widths are powers of two and add up to its bits (`kernels.grid.PLANES`); the narrowest decides.
    """
    multiple = 8 // min(8, bits & -bits)
    for width in shape.widths or (shape.hidden_size, shape.intermediate_size):
        if width % multiple:
            raise Unsupported(f"codes of {bits} bits for {width} input features do not fill bytes; a multiple of {multiple} does")
