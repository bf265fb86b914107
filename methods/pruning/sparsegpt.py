"""SparseGPT: prune column by column and let the remaining weights of the row make up for it, through the inverse Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from methods._common import block_linears, holds_pattern, parse_pattern, save_dense, zero_fraction
from methods.base import HUGGINGFACE, Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs, Unsupported
from methods.pruning.magnitude import check_sparsity

_TOLERANCE = 0.01


@dataclass(frozen=True)
class SparseGPT(Method):
    """Layers are pruned in the order of the network, each on inputs from the pruned layers before it.

    The artefact holds its zeros in dense storage: it is no smaller, and faster only where an engine uses the pattern.

    Attributes:
        sparsity: Fraction of each layer's weights that becomes zero.
        pattern: `n:m` puts n zeros into each m consecutive inputs; None leaves the choice free within a block of columns.
        dampening: Added to the Hessian's diagonal, as a fraction of its mean.
        block_size: Columns updated at once.
    """

    family: ClassVar[str] = "pruning"
    citation: ClassVar[Citation] = Citation(
        "SparseGPT", year=2023, arxiv="2301.00774", covers=("pruning/sparsegpt", "pruning/n-m-sparsity-semi-structured")
    )
    reference: ClassVar[str] = "llmcompressor:modifiers.pruning.SparseGPTModifier"
    needs: ClassVar[Needs] = Needs(calibration=True, extra="pruning", modules=("llmcompressor",))

    sparsity: float = 0.5
    pattern: str | None = None
    dampening: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity, self.pattern)
        if self.dampening <= 0:
            raise ValueError(f"dampening must be positive, not {self.dampening}")
        run = parse_pattern(self.pattern)[1] if self.pattern else 1
        if self.block_size < 1 or self.block_size % run:
            raise ValueError(f"block_size must be a positive multiple of {run}, not {self.block_size}")

    def check(self, shape: ModelShape) -> None:
        if self.pattern:
            run = parse_pattern(self.pattern)[1]
            for width in (shape.hidden_size, shape.intermediate_size):
                if width % run:
                    raise Unsupported(f"pattern {self.pattern} does not divide the input features {width}")

    def compress(self, dense: DenseModel, calibration: Calibration | None, out: Path) -> Claim:
        """Prune, save with the zeros in place, and check that they are there.

        Raises:
            RuntimeError: The library left fewer zeros than asked for, or broke the pattern.
        """
        from methods import _llmcompressor

        assert calibration is not None
        model = dense.load()
        layers = block_linears(model)
        report = _llmcompressor.oneshot(model, self.modifier(), calibration)
        zeros = zero_fraction(layers)
        if zeros < self.sparsity - _TOLERANCE:
            raise RuntimeError(f"llmcompressor left {zeros:.1%} zeros where {self.sparsity:.1%} were asked for")
        if self.pattern and not all(holds_pattern(layer, self.pattern) for layer in layers.values()):
            raise RuntimeError(f"llmcompressor broke the pattern {self.pattern}")
        save_dense(model, out)
        details = {"failed_inverses": report.failed_inverses}
        return Claim(HUGGINGFACE, sparsity=zeros, pattern=self.pattern, details=details)

    def modifier(self) -> object:
        """The library's own object for these settings."""
        from methods import _llmcompressor

        with _llmcompressor.quiet_imports():
            from llmcompressor.modifiers.pruning import SparseGPTModifier

        return SparseGPTModifier(
            sparsity=self.sparsity,
            mask_structure=self.pattern or "0:0",
            dampening_frac=self.dampening,
            block_size=self.block_size,
            targets=["Linear"],
            ignore=["re:.*lm_head"],
        )
