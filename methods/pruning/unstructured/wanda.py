"""Wanda: weights are as important as they are large and as their inputs are strong; what remains is not updated.

The score of a weight from input j to output i, over all calibration tokens, is

    S_ij = |W_ij| ‖X_j‖₂

and it is compared within one output row: each row loses its lowest scores (or each run of m inputs of a row its n lowest).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core import llmcompressor as _llmcompressor
from slimbench.methods.core.settings import Sparse
from slimbench.methods.pruning.unstructured import library as _library


@dataclass(frozen=True)
class Wanda(Sparse, Method):
    """Blocks are pruned in the order of the network, each on inputs from the pruned blocks before it.

    The artefact holds its zeros in dense storage: it is no smaller, and faster only where an engine uses the pattern.

    Attributes:
        sparsity: Fraction of each row's weights that becomes zero.
        pattern: `n:m` puts n zeros into each m consecutive inputs; None leaves the choice free within a row.
    """

    name = "wanda"
    accepts = DENSE
    citation = Citation("Wanda", year=2023, arxiv="2306.11695", covers=("pruning/wanda",))
    reference = "llmcompressor:modifiers.pruning.WandaPruningModifier"
    needs = Needs(calibration=True, extra="pruning", modules=("llmcompressor",))

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        claim, _ = _library.prune(dense, self.modifier(), calibration, self.sparsity, self.pattern, out)
        return claim

    def modifier(self) -> object:
        """The library's own object for these settings."""
        with _llmcompressor.quiet_imports():
            from llmcompressor.modifiers.pruning import WandaPruningModifier

        return WandaPruningModifier(sparsity=self.sparsity, mask_structure=self.pattern or "0:0", **_library.TARGETS)
