"""SparseGPT: prune column by column and let the remaining weights of the row make up for it, through the inverse Hessian."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core import llmcompressor as _llmcompressor
from slimbench.methods.core.masks import parse_pattern
from slimbench.methods.core.settings import SecondOrder, Sparse
from slimbench.methods.pruning.unstructured import library as _library


@dataclass(frozen=True)
class SparseGPT(Sparse, SecondOrder, Method):
    """Layers are pruned in the order of the network, each on inputs from the pruned layers before it.

    The artefact holds its zeros in dense storage: it is no smaller, and faster only where an engine uses the pattern.

    Attributes:
        sparsity: Fraction of each layer's weights that becomes zero.
        pattern: `n:m` puts n zeros into each m consecutive inputs; None leaves the choice free within a block of columns.
        block_size: Columns updated at once; with a pattern it changes speed only.
    """

    name = "sparsegpt"
    accepts = DENSE
    citation = Citation("SparseGPT", year=2023, arxiv="2301.00774", covers=("pruning/sparsegpt", "pruning/n-m-sparsity-semi-structured"))
    reference = "llmcompressor:modifiers.pruning.SparseGPTModifier"
    needs = Needs(calibration=True, extra="pruning", modules=("llmcompressor",))

    block_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        _llmcompressor.check_block_size(self.block_size, parse_pattern(self.pattern)[1] if self.pattern else 1)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        claim, report = _library.prune(dense, self.modifier(), calibration, self.sparsity, self.pattern, out)
        return replace(claim, details={"failed_inverses": report.failed_inverses})

    def modifier(self) -> object:
        """The library's own object for these settings."""
        with _llmcompressor.quiet_imports():
            from llmcompressor.modifiers.pruning import SparseGPTModifier

        return SparseGPTModifier(
            sparsity=self.sparsity,
            mask_structure=self.pattern or "0:0",
            dampening_frac=self.dampening,
            block_size=self.block_size,
            **_library.TARGETS,
        )
