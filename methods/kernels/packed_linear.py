"""The layers that compute with packed weights: a linear layer, and the embedding that shares its weight.

Only the bytes that the kernel reads are kept in memory. The kernel is chosen once, when the layer is made: the first of
`KERNELS` that accepts the weight and can be had on this machine. `kernel` names it; where a faster one accepts the weight but is
missing, `kernel_missing` says why, and the record carries it as a flag.
"""

from __future__ import annotations

from torch import Tensor, nn

from slimbench.methods.kernels.base import Kernel
from slimbench.methods.kernels.cpu.kernel import OwnCpu
from slimbench.methods.kernels.cuda.kernel import OwnCuda
from slimbench.methods.kernels.grid import LowRank, Outliers, QuantizedWeight
from slimbench.methods.kernels.torch.operators import Dequantize, Float8, Int4Pack, Int8Pack, IntMM, TinyGemm
from slimbench.methods.kernels.triton.kernel import OwnTriton
from slimbench.methods.kernels.triton.sparse_kernel import OwnSparse

KERNELS: tuple[type[Kernel], ...] = (OwnCpu, OwnSparse, TinyGemm, OwnCuda, OwnTriton, IntMM, Float8, Int4Pack, Int8Pack, Dequantize)


class PackedLinear(nn.Module):
    """`y = x wᵀ + b` with a packed weight; a low-rank part of it is multiplied on its own and never expanded.

    Args:
        kernels: Those to choose from, the most wanted first.

    Attributes:
        kernel: What computes the product.
        kernel_missing: Why a kernel that comes before it was not taken although it accepts the weight; None where there is none.
        grid: Layout of the weight.
        has_offsets: The grid is not symmetric.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None, kernels: tuple[type[Kernel], ...] = KERNELS) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        self.grid = weight.grid
        self.has_offsets = not weight.symmetric
        self.groups = weight.scales.shape[1]
        self.dtype = weight.scales.dtype
        self._kernel, self.kernel_missing = choose(weight, kernels)
        self.kernel = self._kernel.name
        for name, tensor in self._kernel.prepare(weight).items():
            self.register_buffer(name, tensor)
        self.sparse = weight.outliers is not None
        if weight.outliers is not None:
            self.register_buffer("outlier_starts", weight.outliers.starts)
            self.register_buffer("outlier_columns", weight.outliers.columns)
            self.register_buffer("outlier_values", weight.outliers.values)
        self.has_low_rank = weight.low_rank is not None
        if weight.low_rank is not None:
            self.register_buffer("low_rank_in", weight.low_rank.reduce)
            self.register_buffer("low_rank_out", weight.low_rank.expand)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply inputs [..., in] of the model's dtype; the result is [..., out]."""
        rows = x.reshape(-1, self.in_features)
        y = self._kernel.multiply(self, rows)
        if self.sparse:
            y = self._add_outliers(y, rows)
        if self.has_low_rank:
            y = y + self._low_rank_product(rows)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def rows(self, index: Tensor) -> Tensor:
        """Some rows of the weight on its grid, dequantized: [n, in] for an index [n]."""
        return self._kernel.rows(self, index)

    def dequantize(self) -> Tensor:
        """The weights [out, in] that the layer stands for, read back from what the kernel holds."""
        weight = self._kernel.restore(self)
        return QuantizedWeight(weight.grid, weight.codes, weight.scales, weight.offsets, self.outliers, self.low_rank).dequantize()

    @property
    def outliers(self) -> Outliers | None:
        """What is added to the grid, None where nothing is."""
        parts = ("starts", "columns", "values")
        return Outliers(*(self.get_buffer(f"outlier_{part}") for part in parts)) if self.sparse else None

    @property
    def low_rank(self) -> LowRank | None:
        """What is added to the whole matrix, None where nothing is."""
        return LowRank(self.get_buffer("low_rank_in"), self.get_buffer("low_rank_out")) if self.has_low_rank else None

    def _low_rank_product(self, x: Tensor) -> Tensor:
        part = self.low_rank
        assert part is not None
        return nn.functional.linear(nn.functional.linear(x, part.reduce), part.expand)

    def _add_outliers(self, y: Tensor, x: Tensor) -> Tensor:
        outliers = self.outliers
        assert outliers is not None
        products = x.index_select(1, outliers.columns.long()).float() * outliers.values.float()
        return y.float().index_add_(1, outliers.rows, products).to(y.dtype)

    def build(self) -> str | None:
        """What the code of its kernel is compiled for; None for those of libraries."""
        return self._kernel.build()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.grid}, kernel={self.kernel!r}"


class PackedEmbedding(nn.Module):
    """The input embedding of a model whose output head is packed and shares its weight: rows are expanded when they are looked up."""

    def __init__(self, head: PackedLinear) -> None:
        super().__init__()
        self.head = head

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings [..., hidden] of token ids [...]."""
        return self.head.rows(ids.flatten()).view(*ids.shape, -1)


def choose(weight: QuantizedWeight, kernels: tuple[type[Kernel], ...] = KERNELS) -> tuple[type[Kernel], str | None]:
    """The first kernel that accepts a weight and can be had here, and why an earlier one that accepts it cannot."""
    missing = None
    for kernel in kernels:
        if not kernel.accepts(weight):
            continue
        reason = kernel.missing()
        if reason is None:
            return kernel, missing
        missing = missing or f"{kernel.name}: {reason}"
    raise ValueError(f"no kernel of {', '.join(k.name for k in kernels)} takes {weight.grid} in {weight.scales.dtype}")
