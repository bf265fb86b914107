"""VPTQ: runs of weights of a column as entries of a learned table, the error of each column fed into those still free.

A vector is `vector` consecutive outputs of one input (column). Because the Hessian of a layer's output error couples the inputs of a row
and not its rows, all weights of a column weigh alike, H_jj: the table is the result of k-means over the layer's vectors in which each
counts with the H_jj of its column, and a column is rounded by the nearest entries, after which the columns that follow take up its error
through the inverse Hessian (`methods.core.second_order`). A second table is learned on what the first leaves (residual).

Left out: separate tables for columns with outliers, and the fine-tuning of tables and norms afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, Needs, Unsupported
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

    On smollm2-135m two bits a weight (tables of 256 entries of four weights, 32 × 256 calibration tokens) reach a perplexity of 6345, no
    better than a plain two-bit grid: tables this small, without the fine-tuning of the paper, do not carry a model of this size.

    Attributes:
        vector: Outputs that share an index.
        index_bits: Bits of an index; a table has 2^index_bits entries for each layer.
        tables: 2: a residual table too, of the same size.
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
    act_order: bool = True
    steps: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")

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
        tables = self.learn(weight, moments.hessian.diagonal()).to(weight.dtype)
        entries = tables.float()
        found = torch.empty(self.tables, weight.shape[1], weight.shape[0] // self.vector, dtype=torch.int32, device=weight.device)
        columns = order.tolist()

        def rounder(place: int, pending: Tensor) -> Tensor:
            left = pending[0].view(-1, self.vector)
            rounded = torch.zeros_like(left)
            for table, indices in zip(entries, found, strict=True):
                index, _ = nearest_vectors(left - rounded, table)
                indices[columns[place]] = index
                rounded = rounded + table[index]
            return rounded.flatten()

        sweep(weight.float()[:, order], inverse_factor(moments.hessian[order][:, order], self.dampening), rounder)
        indices = found.mT if self.index_bits > 8 else found.mT.to(torch.uint8)
        return CodebookWeight.of(indices, tables.unsqueeze(1), self.index_bits, weight.dtype, along="out")

    def learn(self, weight: Tensor, importance: Tensor) -> Tensor:
        """Tables [tables, entries, vector] for a weight [out, in] whose columns weigh as `importance` [in] says."""
        import torch

        from slimbench.methods.quantization.grids.k_means import kmeans_vectors, nearest_vectors

        generator = torch.Generator().manual_seed(self.seed)
        vectors = weight.float().T.reshape(-1, self.vector)
        counts = importance.float().repeat_interleave(len(vectors) // weight.shape[1])
        size = _SAMPLES_PER_ENTRY * 2**self.index_bits
        if len(vectors) > size:
            chosen = torch.randperm(len(vectors), generator=generator)[:size].to(vectors.device)
            vectors, counts = vectors[chosen], counts[chosen]
        tables = []
        for _ in range(self.tables):
            tables.append(kmeans_vectors(vectors, 2**self.index_bits, counts, self.steps, generator))
            vectors = vectors - tables[-1][nearest_vectors(vectors, tables[-1])[0]]
        return torch.stack(tables)
