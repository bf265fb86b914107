"""VPTQ: runs of weights of a column as entries of a learned table, the error of each column fed into those still free.

A vector is `vector` consecutive outputs of one input (column). Because the Hessian of a layer's output error couples the inputs of a row
and not its rows, all weights of a column weigh alike, H_jj: the table is the result of k-means over the layer's vectors in which each
counts with the H_jj of its column, and a column is rounded by the nearest entries, after which the columns that follow take up its error
through the inverse Hessian (`methods.core.second_order`). A second table is learned on what the first leaves (residual).

One table serves a whole layer, so weights are made alike first: w = n · scale + offset, and the n are looked up. The authors' program
(`enable_norm`, on in all its examples; the paper has no word of it) normalises columns: offset is the smallest weight of the column,
scale its range. Or every row is divided by its standard deviation, which is ours. Errors are fed back, and count in the k-means, in the
units of the weights; the program leaves both in those of n, where they are no longer errors of the outputs.

Left out: separate tables for columns with outliers, and the fine-tuning of tables and norms afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs, Unsupported
from slimbench.methods.core.layers import block_linears, check_calibration
from slimbench.methods.core.settings import SecondOrder
from slimbench.methods.quantization.grids.codebook_layers import FORMAT

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.core.second_order import Moments
    from slimbench.methods.formats.codebook import CodebookWeight

_SAMPLES_PER_ENTRY = 256


@dataclass(frozen=True)
class VPTQ(SecondOrder, Method):
    """Vector quantization with second-order information, weight only: `tables · index_bits / vector` bits a weight, and the tables.

    Attributes:
        vector: Outputs that share an index.
        index_bits: Bits of an index; a table has 2^index_bits entries for each layer.
        tables: 2: a residual table too, of the same size.
        normalise: `columns` as the authors do, by range and smallest weight; `rows` by their standard deviation; None: not at all.
        act_order: Columns with the largest inputs first.
        steps: Of k-means, at most; on up to 256 vectors for each entry.
        seed: Of the first choice of entries.
    """

    name = "vptq"
    accepts = DENSE
    citation = Citation("VPTQ", year=2024, arxiv="2409.17066", covers=("quantization/vptq",))
    needs = Needs(calibration=True)
    produces = FORMAT
    draws = True
    weight_grid = "codebook"

    vector: Literal[2, 4, 8] = 4
    index_bits: Literal[4, 6, 8, 10, 12] = 8
    tables: Literal[1, 2] = 1
    normalise: Literal["rows", "columns"] | None = None
    act_order: bool = True
    steps: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        for width in () if shape.widths else (shape.hidden_size, shape.intermediate_size):  # edited ones are looked at in `compress`
            if width % self.vector:
                raise Unsupported(f"vectors of {self.vector} do not divide {width} output features")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.formats import codebook
        from slimbench.methods.quantization.solvers.blockwise import quantize_blocks

        calibration = check_calibration(calibration, dense.shape)
        model = dense.load()
        for name, layer in block_linears(model).items():
            if layer.out_features % self.vector:
                raise Unsupported(f"vectors of {self.vector} do not divide the {layer.out_features} outputs of {name}")

        seeded = replace(self, seed=self.seed + dense.seed)

        def quantizer(_: str, weight: Tensor, moments: Moments) -> CodebookWeight:
            return seeded.encode(weight, moments)

        weights: Iterator[tuple[str, CodebookWeight]] = quantize_blocks(model, calibration.ids, quantizer, dense.progress)
        stored = codebook.save(model, weights, out)
        details = {"stored_bits": stored, "vector": self.vector, "tables": self.tables}
        return Claim(self.produces, bits=self.tables * self.index_bits / self.vector, details=details)

    def encode(self, weight: Tensor, moments: Moments) -> CodebookWeight:
        """Tables and indices of a weight [out, in] of the model's dtype."""
        import torch

        from slimbench.methods.core.second_order import Solver, inverse_factor, sweep
        from slimbench.methods.formats.codebook import CodebookWeight
        from slimbench.methods.quantization.grids.k_means import nearest_vectors

        solver = Solver(self.act_order, self.dampening)
        order = solver.order(moments.hessian)
        dense, parts = weight.float(), self.norms(weight)
        scale, offset = (part.float().expand_as(dense) for part in parts)
        tables = self.learn((dense - offset) / scale, scale.square() * moments.hessian.diagonal()).to(weight.dtype)
        entries = tables.float()
        found = torch.empty(self.tables, weight.shape[1], weight.shape[0] // self.vector, dtype=torch.int32, device=weight.device)
        columns = order.tolist()

        def rounder(place: int, pending: Tensor) -> Tensor:
            column = columns[place]
            left = ((pending[0] - offset[:, column]) / scale[:, column]).view(-1, self.vector)
            rounded = torch.zeros_like(left)
            for table, indices in zip(entries, found, strict=True):
                index, _ = nearest_vectors(left - rounded, table)
                indices[column] = index
                rounded = rounded + table[index]
            return rounded.flatten() * scale[:, column] + offset[:, column]

        sweep(dense[:, order], inverse_factor(moments.hessian[order][:, order], self.dampening), rounder)
        indices = found.mT if self.index_bits > 8 else found.mT.to(torch.uint8)
        normed: dict[str, Tensor] = {}
        if self.normalise == "rows":
            normed["scales"] = parts[0].unsqueeze(0)
        elif self.normalise == "columns":
            normed["column_scales"], normed["column_offsets"] = (part.flatten() for part in parts)
        return CodebookWeight.of(indices, tables.unsqueeze(1), self.index_bits, weight.dtype, along="out", **normed)

    def norms(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and offset of a weight [out, in], in its dtype: [out, 1] each by rows, [1, in] by columns, [1, 1] where nothing is done."""
        import torch

        if self.normalise == "columns":
            offset, high = weight.aminmax(dim=0, keepdim=True)
            scale = high - offset
        else:
            scale = weight.float().std(1, keepdim=True).to(weight.dtype) if self.normalise else weight.new_ones(1, 1)
            offset = torch.zeros_like(scale)
        return torch.where(scale == 0, torch.ones_like(scale), scale), offset

    def learn(self, weight: Tensor, cost: Tensor) -> Tensor:
        """Tables [tables, entries, vector] for a weight [out, in], whose squared errors count as `cost` [out, in] says."""
        import torch

        from slimbench.methods.quantization.grids.k_means import kmeans_vectors, nearest_vectors

        generator = torch.Generator().manual_seed(self.seed)
        vectors, counts = (of.float().T.reshape(-1, self.vector) for of in (weight, cost))
        counts = counts.mean(1)
        size = _SAMPLES_PER_ENTRY * 2**self.index_bits
        if len(vectors) > size:
            chosen = torch.randperm(len(vectors), generator=generator)[:size].to(vectors.device)
            vectors, counts = vectors[chosen], counts[chosen]
        tables = []
        for _ in range(self.tables):
            tables.append(kmeans_vectors(vectors, 2**self.index_bits, counts, self.steps, generator))
            vectors = vectors - tables[-1][nearest_vectors(vectors, tables[-1])[0]]
        return torch.stack(tables)
