"""What methods of this room share that set single weights, or tiles of them, to zero while all parameters learn."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import DENSE, HUGGINGFACE, Calibration, Claim, DenseModel, Method, Needs
from slimbench.methods.core.masks import check_sparsity
from slimbench.methods.core.training import TrainingSettings

if TYPE_CHECKING:
    from torch import nn

    from slimbench.methods.core.learning.hooks import Locked


@dataclass(frozen=True)
class SparseTraining(TrainingSettings, Method):
    """A method that trains all parameters and leaves zeros in the linear layers of the blocks, in dense storage.

    Attributes:
        sparsity: Fraction of these layers' weights that is zero at the end, above 0 and below 1.
    """

    accepts = DENSE
    needs = Needs(calibration=True, training=True)

    sparsity: float = 0.5
    loss: Literal["distillation", "nll"] = "nll"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsity(self.sparsity, None)

    @abstractmethod
    def hooks(self, weights: Mapping[str, nn.Parameter], parameters: Mapping[str, nn.Parameter]) -> Locked:
        """What is done between the steps.

        Args:
            weights: [out, in] of the layers that are pruned, by the names of the parameters.
            parameters: All that learn; the weights are among them.

        Raises:
            Unsupported: The weights do not fit the settings.
        """

    def told(self, hooks: Any) -> dict[str, Any]:
        """Details of the claim, of the hooks after the last step."""
        return {}

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.layers import block_linears
        from slimbench.methods.core.learning import trained
        from slimbench.methods.core.masks import zero_fraction

        model = trained.load(dense)
        layers = block_linears(model)
        parameters = dict(model.named_parameters())
        hooks = self.hooks({key: parameters[key] for key in (f"{name}.weight" for name in layers)}, parameters)
        done = trained.fit(self, model, parameters, calibration.ids, dense, hooks)
        trained.save(model, dense, out)
        done = replace(done, parameters=done.parameters - hooks.count)
        return done.added_to(Claim(HUGGINGFACE, sparsity=zero_fraction(layers), teacher=trained.teacher(self), details=self.told(hooks)))
