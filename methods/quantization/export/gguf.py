"""llama.cpp's own quantization: blocks of weights with short scales, written as a GGUF file.

Which type a tensor gets is llama.cpp's choice: a file type such as `Q4_K_M` is a mixture, the embedding and the head keep more
bits than the blocks, and a matrix whose inputs are no multiple of 256 has no k-quant and falls back to a type of blocks of 32
with more bits. What was really chosen is counted in the claim.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.grids import uniform_grid


@dataclass(frozen=True)
class _FileType:
    """A file type of llama.cpp, `LLAMA_FTYPE_MOSTLY_` and its name.

    Attributes:
        bits: Of a weight in its main type, before scales.
        group_size: Weights that share one scale.
        stored_bits: Of a weight with scales, at most, mean over the matrices of a model whose widths are multiples of 256.
    """

    name: str
    bits: int
    group_size: int | None
    stored_bits: float


_FILE_TYPES = {
    "f16": _FileType("F16", 16, None, 16.0),
    "q8_0": _FileType("Q8_0", 8, 32, 8.5),
    "q4_0": _FileType("Q4_0", 4, 32, 4.5),
    "q4_k_m": _FileType("Q4_K_M", 4, 32, 5.0),
    "q2_k": _FileType("Q2_K", 2, 16, 3.25),
}


@dataclass(frozen=True)
class GGUF(Method):
    """A file type of llama.cpp, without an importance matrix.

    Attributes:
        kind: File type; `f16` only changes the format, the others quantize the file of `f16`. `q8_0` and `q4_0` have blocks of 32 inputs
            with one scale. `q4_k_m` has 6 bits in some matrices and `q2_k` 3; widths that 256 does not divide get more.
    """

    name = "gguf"
    citation = Citation("GGUF k-quants", year=2023, covers=("quantization/gguf-k-quants-i-quants",))
    reference = "llama.cpp:llama_model_quantize"
    needs = Needs(environment="llamacpp")
    produces = "gguf"

    kind: Literal["f16", "q8_0", "q4_0", "q4_k_m", "q2_k"] = "q4_0"

    @property
    def weight_grid(self) -> str | None:
        return {"f16": None, "q8_0": uniform_grid(symmetric=True), "q4_0": uniform_grid(symmetric=True)}.get(self.kind, "k-quants")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.formats import gguf as _gguf

        wanted, file = _FILE_TYPES[self.kind], out / _gguf.MODEL
        if self.kind == "f16":
            _gguf.from_huggingface(dense.path, out, half=True)
        else:
            scratch = out / "f16"
            scratch.mkdir()
            source = _gguf.from_huggingface(dense.path, scratch, half=True)
            _quantize(source, file, wanted)
            source.unlink()
            scratch.rmdir()
        details = {
            "file_type": wanted.name,
            "stored_bits": wanted.stored_bits,
            "tensors": _types(file, True),
            "outside_the_blocks": _types(file, False),
        }
        return Claim(self.produces, bits=wanted.bits, group_size=wanted.group_size, details=details)


def _quantize(source: Path, target: Path, wanted: _FileType) -> None:
    """Quantize a GGUF file of floats.

    Raises:
        RuntimeError: llama.cpp could not; it wrote the reason to standard error.
    """
    import llama_cpp
    import torch

    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{wanted.name}")
    settings.nthread = torch.get_num_threads()
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings)):
        raise RuntimeError(f"llama.cpp could not quantize the model to {wanted.name}")


def _types(file: Path, in_blocks: bool) -> dict[str, int]:
    """Matrices by their type, the most frequent first: those inside the blocks, or embedding and head."""
    from gguf import GGUFReader

    matrices = [tensor for tensor in GGUFReader(file).tensors if len(tensor.shape) > 1]
    return dict(Counter(t.tensor_type.name for t in matrices if t.name.startswith("blk.") == in_blocks).most_common())
