"""Methods that fit what a policy brings to each layer, so that its attention comes near the one as it was.

In every layer, with all weights of the model frozen, on the queries, keys and values that the model as it is computes,

    Σ_layers mean ‖ŷ - y‖²        over texts, heads, positions and channels        LoLCATs (arXiv 2410.10254), eq. 5

with y the result of the softmax attention and ŷ that of the policy. So what a layer learns depends on no other layer. A claim tells the
error of each layer before and after, on some of the calibration text (`error_before` and `error_after`, `converted_layers` of them).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from slimbench.methods.base import DENSE, Calibration, Claim, DenseModel, Method, ModelShape, Needs
from slimbench.methods.core.training import TrainingSettings
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.policy import Acts

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slimbench.methods.formats.attention.policy import OperatorPolicy

_TOLD = 4
"""Texts on which the errors of a claim are."""
Named = dict[str, "Tensor"]
"""Tensors by `L.name` of layer L."""


@dataclass(frozen=True)
class AttentionTransfer(TrainingSettings, Acts, Method):
    """What all share.

    Class attributes:
        brings: The field of the policy that holds its tensors.

    Attributes:
        length: Tokens of a sequence at most; calibration windows are cut to it.
        loss: Attentions learn from those of the model itself, and by no other loss.
    """

    needs = Needs(calibration=True, training=True)
    accepts = DENSE
    produces = policies.FORMAT
    least_steps = 1000
    slot = "attention"
    brings: ClassVar[str]

    length: int = 512
    loss: Literal["distillation"] = "distillation"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss != "distillation":
            raise ValueError(f"loss must be 'distillation', that of each attention from the one as it was, not '{self.loss}'")
        self.policy()

    @abstractmethod
    def policy(self) -> OperatorPolicy:
        """Without tensors."""

    @abstractmethod
    def begin(self, model: Any, ids: Tensor) -> tuple[Named, Named]:
        """Tensors that stay as they are, and those that learn, as they are before the first step.

        Args:
            model: In float32.
            ids: Calibration tokens [samples, length].
        """

    def cache_numbers(self, model: Any) -> int | None:
        """Numbers that a further token takes in the cache, where they are others than those of the base."""
        return None

    def check(self, shape: ModelShape) -> None:
        self.policy().check(shape)

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.core.architecture.surgery import counts
        from slimbench.methods.core.learning import trained
        from slimbench.methods.core.training import cut, train

        policies.fits(self.policy().neutral(), dense.path)
        model: Any = trained.load(dense)
        fixed, first = self.begin(model, calibration.ids)
        learned = {name: torch.nn.Parameter(tensor) for name, tensor in first.items()}
        windows, errors = cut(calibration.ids, self.length), self.errors(model, fixed, learned)
        before = _told(errors, windows)
        done = train(self, learned, lambda ids: torch.stack(errors(ids)).sum(), windows, dense)
        stored = {name: tensor.detach().to(getattr(torch, dense.dtype)) for name, tensor in learned.items()}
        for name, tensor in learned.items():
            tensor.data.copy_(stored[name])
        after = _told(errors, windows)
        policies.save(replace(self.policy(), **{self.brings: fixed | stored}), dense, out)  # type: ignore[type-var]
        numbers = self.cache_numbers(model)
        added = sum(tensor.numel() for tensor in stored.values())
        claim = Claim(
            self.produces,
            parameters=counts(model)["parameters"] + added,
            cache_bytes_per_token=None if numbers is None else float(numbers * getattr(torch, dense.dtype).itemsize),
            teacher="the model itself",
            details={"policy_parameters": added, "converted_layers": len(after), "error_before": before, "error_after": after},
        )
        return done.added_to(claim)

    def errors(self, model: Any, fixed: Mapping[str, Tensor], learned: Mapping[str, nn.Parameter]) -> Callable[[Tensor], list[Tensor]]:
        """The mean squared error of each layer, on texts [n, T]; arguments as `begin` gives them."""
        import torch

        from slimbench.methods.core.learning.states import unrotated
        from slimbench.methods.formats.attention.operators.interface import Rotary, attention, attentions

        policy: Any = replace(self.policy(), **{self.brings: {**fixed, **learned}})  # type: ignore[type-var]
        rotary = Rotary(model.base_model.rotary_emb)
        operators = {part.layer_idx: policy.operator(rotary, part.scaling, part.layer_idx).to(model.device) for part in attentions(model)}

        def found(ids: Tensor) -> list[Tensor]:
            rotary.forget()
            errors = []
            for layer, (query, key, value) in unrotated(model, ids).items():
                with torch.no_grad():
                    wanted = attention(rotary(query, 0), rotary(key, 0), value, operators[layer].scaling)
                errors.append((operators[layer](query, key, value, None) - wanted).square().mean())
            return errors

        return found


def _told(errors: Callable[[Tensor], list[Tensor]], windows: Tensor) -> list[float]:
    """The error of each layer on the first windows."""
    import torch

    with torch.no_grad():
        return [float(error) for error in errors(windows[:_TOLD])]
