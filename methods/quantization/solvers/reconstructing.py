"""What methods that learn a rounding block by block share: their settings and how they run."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from slimbench.methods.base import Calibration, Claim, DenseModel, Method, Needs, Unsupported
from slimbench.methods.core.layers import block_linears, check_groups
from slimbench.methods.core.settings import Grouped

if TYPE_CHECKING:
    from torch import nn

    from slimbench.methods.kernels.grid import Grid
    from slimbench.methods.quantization.solvers.learned import LearnedLinear


@dataclass(frozen=True)
class Reconstructing(Grouped, Method):
    """Weight only, uniform groups; embeddings, norms and output head keep their dtype.

    Attributes:
        bits: Bits of a weight, before scales.
        steps: Gradient steps for each unit that is learned.
        samples: Calibration samples of a step.
        learning_rate: Of Adam, falling linearly to zero.
    """

    needs = Needs(calibration=True, training=True)
    produces = "packed"
    draws = True
    scope: ClassVar[Literal["block", "layer", "dense block"]] = "block"

    bits: Literal[2, 3, 4] = 4
    steps: int = 1000
    samples: int = 8
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("steps", "samples", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")

    @abstractmethod
    def learner(self, source: nn.Linear, grid: Grid) -> LearnedLinear:
        """A layer that learns how to round the weight of another one."""

    @property
    def symmetric_grid(self) -> bool:
        """Whether the grid is centred on zero."""
        return bool(getattr(self, "symmetric", False))

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        """Learn block by block and write the codes packed.

        Raises:
            Unsupported: The model is stored in float16, in which small gradients vanish.
            FloatingPointError: The loss is not finite.
        """
        from slimbench.methods.formats import packed
        from slimbench.methods.quantization.solvers.reconstruction import Reconstruction

        if dense.dtype == "float16":
            raise Unsupported("gradients vanish in float16; load the model in bfloat16 or float32")
        model = dense.load()
        check_groups(block_linears(model), self.group_size)
        grid = packed.Grid(self.bits, self.group_size)
        learning = Reconstruction(
            lambda source: self.learner(source, grid),
            self.scope,
            self.steps,
            min(self.samples, len(calibration.ids)),
            self.learning_rate,
            seed=dense.seed,
            folder=dense.checkpoints,
            identity=f"{self!r} {calibration.fingerprint} {dense.seed}",
        )
        packed.save(model, learning.run(model, calibration.ids, dense.progress), out)
        return Claim(
            self.produces,
            bits=self.bits,
            group_size=self.group_size,
            training_tokens=learning.tokens,
            trained_parameters=learning.parameters,
            details={"symmetric": self.symmetric_grid, "steps": self.steps} | learning.details(),
        )
