"""What a method does between the parts of a training step: rates of its own for some parameters, masks, ranks, schedules.

A step of `methods.core.training.train` is

    gradients of the batch, after_backward, clipping, update of the parameters, after_step, gradients are dropped

and `state` lies in the checkpoint with the parameters, so that a run that is interrupted and resumed ends with the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class Group:
    """Parameters that are updated otherwise than the settings of the training say.

    Attributes:
        names: As `train` gets them.
        factor: Of the learning rate.
        weight_decay: Of the optimizer; None: that of the settings.
        maximize: They climb the loss, as the multipliers of a Lagrangian do.
        free: Their gradients are of another scale than those of weights: they are not clipped with them, and no eps of the optimizer
            stands beside their size.
    """

    names: tuple[str, ...]
    factor: float = 1.0
    weight_decay: float | None = None
    maximize: bool = False
    free: bool = False


class Hooks:
    """Does nothing; a class derived from it says what it does. Steps are counted from 0."""

    def groups(self) -> Sequence[Group]:
        """The parameters that are updated otherwise; of several groups that name one, the last holds."""
        return ()

    def after_backward(self, step: int) -> None:
        """The gradients of the whole batch are there and not yet clipped."""

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """The parameters are updated; their gradients, clipped, are still there."""

    def state(self) -> dict[str, Tensor]:
        """What the rest of the run depends on, by name; before the first step it is part of what tells runs apart."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state that `state` gave in another process; its tensors are on the CPU."""


@dataclass
class Locked(Hooks):
    """Weights that stay zero: they have no gradient, so that it is not clipped for their sake, and no update and no moment moves them.

    Attributes:
        parameters: By the names that `train` gets; those without a mask are not locked.
        masks: By name, true where a weight is zero; others may take their place between two steps.
    """

    parameters: Mapping[str, nn.Parameter]
    masks: dict[str, Tensor]

    @classmethod
    def zeros(cls, parameters: Mapping[str, nn.Parameter]) -> Self:
        """All weights that are zero now."""
        return cls(parameters, {name: value.detach() == 0 for name, value in parameters.items()})

    @property
    def count(self) -> int:
        """How many weights are locked."""
        return sum(int(mask.sum()) for mask in self.masks.values())

    def after_backward(self, step: int) -> None:
        for name, mask in self.masks.items():
            if (gradient := self.parameters[name].grad) is not None:
                gradient.masked_fill_(mask, 0.0)

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        for name, mask in self.masks.items():
            value = self.parameters[name]
            value.detach().masked_fill_(mask, 0.0)
            for moment in optimizer.state[value].values():
                if moment.shape == mask.shape:
                    moment.masked_fill_(mask, 0.0)

    def state(self) -> dict[str, Tensor]:
        return dict(self.masks)

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.masks = {name: mask.to(self.parameters[name].device) for name, mask in state.items()}


_NO_EPS = 1e-30  # of Adam; squares of gradients stay above it in float32 down to 1e-19


def regroup(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], groups: Sequence[Group]) -> None:
    """Give groups of parameters a factor of the rate, a decay and a direction of their own.

    Raises:
        ValueError: The optimizer has no decay, or no other direction.
    """
    for group in groups:
        wanted = {"weight_decay": group.weight_decay, "maximize": group.maximize or None, "eps": _NO_EPS if group.free else None}
        options = {name: value for name, value in wanted.items() if value is not None}
        if unknown := options.keys() - optimizer.defaults.keys():
            raise ValueError(f"{type(optimizer).__name__} has no {' and no '.join(sorted(unknown))}")
        chosen = [parameters[name] for name in group.names]
        moved = {id(value) for value in chosen}
        for held in optimizer.param_groups:
            held["params"] = [value for value in held["params"] if id(value) not in moved]
        optimizer.add_param_group({"params": chosen, "factor": group.factor} | options)
    optimizer.param_groups[:] = [held for held in optimizer.param_groups if held["params"]]
