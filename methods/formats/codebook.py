"""The codebook artefact format: linear layers whose weights are indices into tables of levels.

A weight is the sum, over one or more codebooks `k`, of a level times a scale; single weights may stand outside of it:

    w[o, i] = Σ_k scale[k, o, i // group] · table[k, o][code[k, o, i // dim], i % dim] · tensor_scale + offset[o, i // group]

or, where columns are normalised, that times column_scale[i], plus column_offset[i]; or, where scales have two levels
(`methods.formats.bilevel`), that less a zero point, times a scale.

That covers formats of few bits (one table of scalars for the model), k-means (a table for a layer or for each row), vectors (`dim` > 1),
residual and additive codebooks (several `k`) and binary coding (table -1, 1 and a scale for each `k`).

The folder holds an ordinary `config.json`, and `model.safetensors` in which each such `X.weight` is replaced by

    X.codes         uint8 [books, out, in / dim · bits / 8]: a row holds the codes in planes of 8, 4, 2 and 1 bits, as in
                    `methods.kernels.grid`, the lowest bits first; with vectors along the outputs [books, out / dim, in · bits / 8]
    X.codebook      levels [books, tables, entries, dim]; books is 1 where all share a table, tables is 1 for the layer, out for one a row.
                    Where layers share a table, it is stored once, as `codebooks.N`
    X.scales        [books, out, groups] in the model's dtype, float32, float8_e4m3fn or float8_e8m0fnu; books is 1 where all share a
                    scale, groups is 1 for one a row; absent where there are none
    X.tensor_scale  float32 []; absent where it is 1
    X.offsets       [out, groups]; absent where there are none
    X.column_scales, X.column_offsets
                    [in] each; absent where columns are not normalised
    X.group_codes, X.group_ranges
                    scales and zero points of two levels; absent where there are none
    X.outlier_starts, X.outlier_columns, X.outlier_values
                    int32 [out + 1], int32 [n], model dtype [n]: these weights stand for themselves, by rows; absent where there are none

`codebook.json` names the schema, the layout of the layers (`default`) and the layers that differ from it (`layers`). A layout is `bits` of
a code, `along` (`in` or `out`: where vectors lie) and `table`, the N of a shared table (null: the layer has its own).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from slimbench.methods.formats import storage
from slimbench.methods.formats.bilevel import Bilevel
from slimbench.methods.kernels.grid import PLANES, Outliers, pack, unpack
from slimbench.methods.kernels.packed_linear import PackedEmbedding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCHEMA = 1
DESCRIPTION = "codebook.json"
_SHARED = "codebooks."
_OPTIONAL = ("scales", "tensor_scale", "offsets", "column_scales", "column_offsets")
_WIDE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class CodebookWeight:
    """A weight matrix as indices into tables of levels.

    Attributes:
        codes: Indices as they are stored, uint8 [books, out, bytes] ([books, out / dim, bytes] with vectors along the outputs).
        codebook: Levels [1 or books, 1 or out, entries, dim].
        bits: Bits in which an index is stored.
        dtype: That of the weights.
        scales: [1 or books, out, groups] of any floating type, None where there are none.
        tensor_scale: float32 [], None where it is 1.
        offsets: [out, groups], None where there are none.
        column_scales: [in], None where columns are not normalised.
        column_offsets: [in], None where columns are not normalised.
        bilevel: Scales and zero points of two levels, None where there are none.
        outliers: Weights that stand for themselves, None where there are none.
        along: Whether a vector covers consecutive inputs of a row or consecutive outputs of a column.
    """

    codes: Tensor
    codebook: Tensor
    bits: int
    dtype: torch.dtype
    scales: Tensor | None = None
    tensor_scale: Tensor | None = None
    offsets: Tensor | None = None
    column_scales: Tensor | None = None
    column_offsets: Tensor | None = None
    bilevel: Bilevel | None = None
    outliers: Outliers | None = None
    along: Literal["in", "out"] = "in"

    @classmethod
    def of(cls, indices: Tensor, codebook: Tensor, bits: int, dtype: torch.dtype, **more: Any) -> CodebookWeight:
        """Pack indices [books, out, in / dim] ([books, out / dim, in] with vectors along the outputs); `more` are other attributes.

        Raises:
            ValueError: They do not fit into `bits`, or rows of them do not end at a byte.
        """
        if bits not in PLANES:
            raise ValueError(f"codes are stored in {', '.join(map(str, PLANES))} bits, not in {bits}")
        if codebook.shape[2] > 2**bits:
            raise ValueError(f"{codebook.shape[2]} levels do not fit into codes of {bits} bits")
        if indices.shape[2] * PLANES[bits][-1] % 8:
            raise ValueError(f"{indices.shape[2]} codes of {bits} bits do not end at a byte")
        stored = pack(indices.flatten(0, 1), bits).to(torch.uint8)
        return cls(stored.unflatten(0, indices.shape[:2]).contiguous(), codebook, bits, dtype, **more)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        _, rows, stored = self.codes.shape
        columns, dim = stored * 8 // self.bits, self.codebook.shape[3]
        return (rows, columns * dim) if self.along == "in" else (rows * dim, columns)

    def indices(self) -> Tensor:
        """Indices [books, out, in / dim] ([books, out / dim, in] with vectors along the outputs), uint8 up to 8 bits, int32 above."""
        return unpack(self.codes.flatten(0, 1), self.bits).unflatten(0, self.codes.shape[:2])

    def dequantize(self) -> Tensor:
        """The weights [out, in], computed in float32 and rounded once."""
        weight = self._scaled(0)
        for book in range(1, len(self.codes)):
            weight = weight.float().add_(self._scaled(book))
        if self.offsets is not None:
            weight = (weight.unflatten(1, (self.offsets.shape[1], -1)) + self.offsets.float().unsqueeze(-1)).flatten(1)
        if self.bilevel is not None:
            scales, zeros = (part.unsqueeze(-1) for part in self.bilevel.expand())
            weight = ((weight.float().unflatten(1, (scales.shape[1], -1)) - zeros) * scales).flatten(1)
        if self.column_scales is not None and self.column_offsets is not None:
            weight = weight.float() * self.column_scales.float() + self.column_offsets.float()
        weight = weight.to(self.dtype)
        if self.outliers is not None:
            apart = self.outliers
            weight = weight.index_put((apart.rows, apart.columns.long()), apart.values)
        return weight

    def _scaled(self, book: int) -> Tensor:
        """What one codebook adds: [out, in] in float32, or in the dtype of the weights where that rounds but once."""
        codes, table = self.codes[book], self.codebook[book % len(self.codebook)]
        if self.scales is None:
            return self._look_up(codes, table)
        scales = self.scales[book % len(self.scales)]
        others = (self.offsets, self.tensor_scale, self.column_scales, self.bilevel)
        alone = len(self.codes) == 1 and all(part is None for part in others)
        if not (alone and table.dtype == scales.dtype == self.dtype):
            scales, table = scales.float(), table.float()
        if self.tensor_scale is not None:
            scales = scales * self.tensor_scale
        return self._look_up(codes, table).unflatten(1, (scales.shape[1], -1)).mul_(scales.unsqueeze(-1)).flatten(1)

    def _look_up(self, codes: Tensor, table: Tensor) -> Tensor:
        """Levels [out, in] of one codebook [tables, entries, dim]."""
        tables, entries, dim = table.shape
        if tables == 1 and len(PLANES[self.bits]) == 1 and self.bits < 8:
            table, index = _of_bytes(table[0], self.bits), codes.int()
        else:
            table, index = table.flatten(0, 1), unpack(codes, self.bits, _fields_of_bytes).int()
            if tables > 1:
                index = index + torch.arange(0, tables * entries, entries, device=index.device, dtype=torch.int32)[:, None]
        found = _select(table, index).view(len(codes), -1, dim)
        return found.flatten(1) if self.along == "in" else found.transpose(1, 2).flatten(0, 1)

    def parts(self) -> dict[str, Tensor]:
        """The tensors as they are stored and kept in memory, by name."""
        kept = {name: tensor for name in ("codes", "codebook", *_OPTIONAL) if (tensor := getattr(self, name)) is not None}
        return kept | (self.bilevel.parts() if self.bilevel else {}) | (self.outliers.parts() if self.outliers else {})

    @classmethod
    def from_parts(cls, parts: dict[str, Tensor], bits: int, dtype: torch.dtype, along: Literal["in", "out"]) -> CodebookWeight:
        """What `parts` took apart."""
        more: dict[str, Any] = {name: parts.get(name) for name in _OPTIONAL}
        more |= {"bilevel": Bilevel.from_parts(parts), "outliers": Outliers.from_parts(parts)}
        return cls(parts["codes"], parts["codebook"], bits, dtype, **more, along=along)


def _select(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table [entries, numbers], [n · numbers] for n indices; four times faster where a row fits into one wide integer."""
    wide = _WIDE.get(table.shape[1] * table.element_size())
    if wide is None:
        return table.index_select(0, index.flatten()).flatten()
    return table.contiguous().view(wide).flatten().index_select(0, index.flatten()).view(table.dtype)


def _of_bytes(table: Tensor, bits: int) -> Tensor:
    """The levels of all codes in a byte, [256, numbers], from those of a code [entries, dim]: one look-up serves several codes."""
    codes = unpack(torch.arange(256, dtype=torch.uint8, device=table.device).unsqueeze(1), bits)
    return nn.functional.pad(table, (0, 0, 0, 2**bits - len(table)))[codes.long()].flatten(1)


def _fields_of_bytes(stored: Tensor, width: int) -> Tensor:
    """Bytes [rows, n] taken apart into fields [rows, n · 8 / width]."""
    if width == 8:
        return stored
    values = torch.arange(2**width, dtype=torch.uint8, device=stored.device).unsqueeze(1)
    return _select(_of_bytes(values, width), stored.int()).view(len(stored), -1)


class CodebookLinear(nn.Module):
    """`y = x wᵀ + b` with a weight that is expanded for each product; memory holds only what is stored.

    Attributes:
        kernel: What computes the product.
    """

    kernel = "dequantize + matmul"

    def __init__(self, weight: CodebookWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bits, self.dtype, self.along = weight.bits, weight.dtype, weight.along
        parts = weight.parts()
        self._parts = tuple(parts)
        for name, tensor in parts.items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def weight_in_parts(self) -> CodebookWeight:
        """The weight as indices and tables."""
        parts = {name: self.get_buffer(name) for name in self._parts}
        return CodebookWeight.from_parts(parts, self.bits, self.dtype, self.along)

    def dequantize(self) -> Tensor:
        """The weights [out, in] that the layer stands for."""
        return self.weight_in_parts.dequantize()

    def rows(self, index: Tensor) -> Tensor:
        """Some rows of the weight: [n, in] for an index [n]."""
        return self.dequantize()[index]

    def forward(self, x: Tensor) -> Tensor:
        """Multiply inputs [..., in] of the model's dtype; the result is [..., out]."""
        return nn.functional.linear(x, self.dequantize(), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


def save(model: PreTrainedModel, weights: Iterable[tuple[str, CodebookWeight]], out: Path) -> float:
    """Write a model with the weights of some linear layers as indices. Layers share a table if their weights hold the same tensor.

    Args:
        model: Gives the config and every tensor that is not replaced.
        weights: Names of `nn.Linear` layers with their weights; consumed one at a time.
        out: Folder to write into.

    Returns:
        Bits that the replaced layers take for each weight: codes, tables, scales, outliers and biases, rounded up to four digits.
    """
    layouts: dict[str, dict[str, Any]] = {}
    tables: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    count = 0
    for name, weight in weights:
        layouts[name] = {"bits": weight.bits, "along": weight.along, "table": None}
        parts = weight.parts()
        tables[name] = parts.pop("codebook")
        tensors |= {f"{name}.{part}": storage.on_disk(tensor) for part, tensor in parts.items()}
        count += math.prod(weight.shape)
    sharing = Counter(table.data_ptr() for table in tables.values())
    shared = [pointer for pointer, layers in sharing.items() if layers > 1]
    for name, table in tables.items():
        if table.data_ptr() in shared:
            layouts[name]["table"] = shared.index(table.data_ptr())
        tensors[f"{name}.codebook" if layouts[name]["table"] is None else f"{_SHARED}{layouts[name]['table']}"] = storage.on_disk(table)
    stored = sum(tensor.nbytes for tensor in tensors.values())
    stored += sum(bias.nbytes for name in layouts if (bias := getattr(model.get_submodule(name), "bias", None)) is not None)
    storage.save(model, layouts, tensors, out)
    storage.describe(out, DESCRIPTION, "codebook", SCHEMA, layouts, {"bits": 8, "along": "in", "table": None})
    return math.ceil(1e4 * 8 * stored / max(count, 1)) / 1e4


def load(folder: Path, device: str = "cpu", trust_remote_code: bool = False) -> nn.Module:
    """Load an artefact in evaluation mode. Dense weights of the replaced layers are never allocated.

    Raises:
        ValueError: The schema is newer than this program, or tensors are missing or left over.
    """
    from safetensors import safe_open
    from transformers import AutoConfig

    layout = storage.described(folder, DESCRIPTION, SCHEMA)
    dtype = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).dtype
    with safe_open(folder / storage.WEIGHTS, framework="pt", device=device) as file:
        shared = {key.removeprefix(_SHARED): file.get_tensor(key) for key in file.keys() if key.startswith(_SHARED)}  # noqa: SIM118

    def build(name: str, parts: dict[str, Tensor]) -> CodebookLinear:
        described = layout(name)
        if described["table"] is not None:
            parts["codebook"] = shared[str(described["table"])]
        return CodebookLinear(CodebookWeight.from_parts(parts, described["bits"], dtype, described["along"]), parts.get("bias"))

    return storage.load(folder, device, "codes", build, PackedEmbedding, aside=_SHARED, trust_remote_code=trust_remote_code)
