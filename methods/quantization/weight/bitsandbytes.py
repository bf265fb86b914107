"""The schemes of bitsandbytes, through transformers: LLM.int8(), NF4 and FP4.

Both are saved before any forward pass: the library's CPU kernels repack the weights in the first one, and what is saved after that
loads as garbage without an error. On a CPU with AVX-512 for bfloat16 its four-bit kernels also hold the block scales in bfloat16: double
quantization then makes the file smaller (0.127 bits of scales for each weight), but not the memory (0.25 bits).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.formats.architecture.structure import check_experts

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

_FORMAT = "bitsandbytes"
_BLOCK = 64
_SCALES = 256


class _BitsAndBytes(Method):
    """What they share: quantize while loading, save at once."""

    needs = Needs(extra="quantization", modules=("bitsandbytes",))
    produces = _FORMAT

    @abstractmethod
    def config(self, dense: DenseModel) -> BitsAndBytesConfig:
        """The library's own settings."""

    @abstractmethod
    def claim(self) -> Claim:
        """What the artefact holds."""

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        model = dense.load(quantization_config=self.config(dense), device_map=dense.device)
        check_experts(model)
        model.save_pretrained(out)
        return self.claim()


@dataclass(frozen=True)
class LLMInt8(_BitsAndBytes):
    """LLM.int8(): int8 weights by row and int8 inputs by token, but input features with outliers stay in 16 bits.

    Attributes:
        threshold: Magnitude of an input feature from which it counts as an outlier and is multiplied in 16 bits.
    """

    name = "llm-int8"
    citation = Citation("LLM.int8()", year=2022, arxiv="2208.07339", covers=("quantization/llm-int8",))
    reference = "bitsandbytes:nn.Linear8bitLt"
    weight_grid = uniform_grid(symmetric=True)

    threshold: float = 6.0

    def __post_init__(self) -> None:
        if self.threshold < 0:
            raise ValueError(f"threshold must not be negative, not {self.threshold}")

    def config(self, dense: DenseModel) -> BitsAndBytesConfig:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=self.threshold)

    def claim(self) -> Claim:
        return Claim(_FORMAT, bits=8, activation_bits=8, details={"outlier_threshold": self.threshold})


@dataclass(frozen=True)
class _FourBits(_BitsAndBytes):
    """Sixteen levels that the library fixes, blocks of 64 weights with one scale.

    Attributes:
        double_quant: Quantize the scales to 8 bits as well: 0.37 bits less a weight.
    """

    reference = "bitsandbytes:nn.Linear4bit"
    levels: ClassVar[str]

    double_quant: bool = True

    def config(self, dense: DenseModel) -> BitsAndBytesConfig:
        import torch
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.levels,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=getattr(torch, dense.dtype),
        )

    def claim(self) -> Claim:
        """What the artefact holds; the bits of scales are those of QLoRA, section 3."""
        scales = 8 / _BLOCK + 32 / (_BLOCK * _SCALES) if self.double_quant else 32 / _BLOCK
        return Claim(_FORMAT, bits=4, group_size=_BLOCK, details={"double_quant": self.double_quant, "stored_bits": 4 + scales})


@dataclass(frozen=True)
class NF4(_FourBits):
    """NormalFloat: the levels stand at the quantiles of a normal distribution."""

    name = "nf4"
    citation = Citation("NF4 (QLoRA)", year=2023, arxiv="2305.14314", covers=("quantization/normalformat-nf4-in-qlora",))
    weight_grid = "codebook"
    levels = "nf4"


@dataclass(frozen=True)
class FP4(_FourBits):
    """A floating-point number of 4 bits: sign, two of exponent, one of mantissa, as the QLoRA paper compares it with NF4."""

    name = "fp4"
    citation = Citation("FP4 (bitsandbytes)", year=2023, arxiv="2305.14314")
    weight_grid = "float"
    levels = "fp4"
