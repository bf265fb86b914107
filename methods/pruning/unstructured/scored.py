"""Methods that prune by a score of each weight: what all of them do, so that a method is its score alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slimbench.methods.base import DENSE, HUGGINGFACE, Calibration, Claim, DenseModel, Method, Needs
from slimbench.methods.core.layers import block_linears, check_calibration
from slimbench.methods.core.masks import Scope, check_runs, choose, zero_fraction
from slimbench.methods.core.settings import Sparse
from slimbench.methods.formats.huggingface import save_dense

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from slimbench.methods.core.statistics import Inputs
    from slimbench.methods.core.walk import Block


@dataclass(frozen=True)
class Scored(Sparse, Method):
    """Blocks are pruned in the order of the network, each by the inputs that the pruned blocks before it make; what remains is not updated.

    The artefact holds its zeros in dense storage: it is no smaller, and faster only where an engine uses the pattern.

    Class attributes:
        scope: Among which weights of a layer scores are compared.
    """

    accepts: ClassVar[tuple[str, ...]] = DENSE
    needs = Needs(calibration=True)
    scope: ClassVar[Scope] = "row"

    @abstractmethod
    def scores(self, name: str, layer: nn.Linear, inputs: Inputs, extra: Mapping[str, Tensor]) -> Tensor:
        """How much each weight matters, float32 [out, in]: the lowest go.

        Args:
            name: Full name of the layer.
            inputs: Statistics of its inputs.
            extra: What `prepare` and `look` gave, by the names of layers.
        """

    def prepare(self, model: PreTrainedModel, dense: DenseModel, calibration: Calibration) -> Mapping[str, Tensor]:
        """What the scores need of the whole dense model, by layer; asked before its first block is pruned."""
        return {}

    def look(self, block: Block, inputs: Mapping[str, Inputs]) -> Mapping[str, Tensor]:
        """What the scores need of a block beside the statistics of its inputs, by layer; asked before the block is pruned."""
        return {}

    def scored(self, model: PreTrainedModel, dense: DenseModel, calibration: Calibration) -> Iterator[tuple[str, nn.Linear, Tensor]]:
        """Yield the layers with their names and scores; what the caller prunes counts for the inputs of the blocks after it."""
        from slimbench.methods.core.statistics import inputs
        from slimbench.methods.core.walk import walk

        prepared = self.prepare(model, dense, calibration)
        for block in walk(model, calibration.ids, dense.progress):
            seen = inputs(block)
            extra = {**prepared, **self.look(block, seen)}
            for name, layer in block.linears().items():
                yield name, layer, self.scores(name, layer, seen[name], extra)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        check_calibration(calibration, dense.shape)
        model = dense.load()
        layers = block_linears(model)
        check_runs(layers, self.pattern)
        for _, layer, scores in self.scored(model, dense, calibration):
            zeros = round(self.sparsity * layer.weight.numel())
            layer.weight.data.masked_fill_(choose(scores, zeros, self.scope, self.pattern), 0.0)
        save_dense(model, out)
        return Claim(HUGGINGFACE, sparsity=zero_fraction(layers), pattern=self.pattern)
