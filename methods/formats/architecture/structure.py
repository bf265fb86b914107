"""Where the decoder blocks of a loaded model are, and what in it is no linear layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Unsupported

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def check_experts(model: Any) -> None:
    """Raise `Unsupported` if the matrices of experts lie in one tensor, where nobody finds them who looks for linear layers."""
    of_policies = {id(part) for module in model.modules() if hasattr(module, "operator") for part in module.operator.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in of_policies and sum(size > 1 for size in parameter.shape) > 2:
            raise Unsupported(f"{name} holds {len(parameter)} experts in one tensor; only linear layers can be handled")


def blocks_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The decoder blocks by name, in order.

    Raises:
        Unsupported: The model has no list of them.
    """
    from torch import nn

    wanted = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return {f"{name}.{index}": block for index, block in enumerate(module)}
    raise Unsupported(f"{type(model).__name__} has no list of {wanted} decoder blocks")
