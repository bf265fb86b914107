"""The two recipes of ONNX Runtime's own quantizer for matrix products: dynamic int8, and 4 bits in groups."""

from __future__ import annotations

import shutil
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs, Unsupported
from slimbench.methods.core.grids import uniform_grid
from slimbench.util import files

_LARGE = 1 << 30  # bytes from which constants lie beside the graph: one file of it holds less than 2 GiB


class _ONNX(Method):
    """What both share: export in float32, quantize the graph."""

    needs = Needs(extra="engines", modules=("onnxruntime", "onnx", "onnx_ir"))
    produces = "onnx"

    @abstractmethod
    def quantize(self, source: Path, out: Path) -> None:
        """Write the quantized graph of a float32 graph to `out`."""

    @abstractmethod
    def claim(self) -> Claim:
        """What the artefact holds."""

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.formats import onnx as _onnx

        with files.scratch("onnx") as scratch:
            self.quantize(_onnx.export(dense.path, Path(scratch)), out / _onnx.GRAPH)
        shutil.copyfile(dense.path / "config.json", out / "config.json")
        return self.claim()


@dataclass(frozen=True)
class DynamicInt8(_ONNX):
    """int8 weights, and inputs that are rounded to 8 bits as they come, one scale for the whole input tensor.

    The output head and the embedding take 8 bits as well. With one scale for the tensor, a token's logits depend on the tokens that go
    through the graph with it: on later ones, on padding, and on the other sequences of the batch.

    Attributes:
        per_channel: One scale for each output of a matrix; else one for all of it, the library's default.
    """

    name = "onnx-dynamic-int8"
    citation = Citation("Dynamic INT8 (Q8BERT-style, ONNX Runtime)", year=2019, arxiv="1910.06188")
    reference = "onnxruntime:quantization.quantize_dynamic"
    weight_grid = uniform_grid(symmetric=True)
    causal = False

    per_channel: bool = True

    def quantize(self, source: Path, out: Path) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            source,
            out,
            per_channel=self.per_channel,
            weight_type=QuantType.QInt8,
            use_external_data_format=_size(source) > _LARGE,
        )

    def claim(self) -> Claim:
        return Claim(self.produces, bits=8, activation_bits=8, details={"per_channel": self.per_channel, "head_bits": 8})


@dataclass(frozen=True)
class MatMulNBits(_ONNX):
    """Round-to-nearest in groups, 4 bits, the output head included; the embedding keeps float32.

    Attributes:
        group_size: Inputs that share one scale; must divide the input features.
        symmetric: Centre the grid on zero; else fit it to the smallest and largest weight.
        activation_bits: Bits to which inputs are rounded for the product, one scale a group; None: they keep float32.
    """

    name = "onnx-matmul-nbits"
    citation = Citation("MatMulNBits (ONNX Runtime)", year=2023)
    reference = "onnxruntime:quantization.matmul_nbits_quantizer.MatMulNBitsQuantizer"

    group_size: Literal[16, 32, 64, 128, 256] = 64
    symmetric: bool = True
    activation_bits: Literal[8] | None = 8

    @property
    def weight_grid(self) -> str:
        return uniform_grid(self.symmetric)

    def check(self, shape: ModelShape) -> None:
        shape.check_group(self.group_size)

    def quantize(self, source: Path, out: Path) -> None:
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        level = 4 if self.activation_bits else 1
        work = MatMulNBitsQuantizer(
            onnx.load(source), bits=4, block_size=self.group_size, is_symmetric=self.symmetric, accuracy_level=level
        )
        work.process()
        if left := sum(node.op_type == "Gemm" for node in work.model.model.graph.node):
            raise Unsupported(f"{left} products with a bias are of a kind that the library leaves in float32")
        work.model.save_model_to_file(str(out), _size(source) > _LARGE)

    def claim(self) -> Claim:
        details = {"symmetric": self.symmetric, "head_bits": 4}
        return Claim(self.produces, bits=4, group_size=self.group_size, activation_bits=self.activation_bits, details=details)


def _size(graph: Path) -> int:
    """Bytes of a graph with everything beside it."""
    return sum(file.stat().st_size for file in graph.parent.iterdir())
