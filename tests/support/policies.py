"""Models under a policy, and whether its own code ran."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.methods.formats.architecture.layout import layout_of
from slimbench.methods.formats.architecture.structure import blocks_of
from slimbench.methods.formats.depth.rows import Partial
from slimbench.methods.formats.policy import Policy
from tests.support import tiny


def sharp(**shape: int) -> Any:
    """A tiny Llama in float32, with weights that make attentions sharp. `shape` overrides fields of its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(tiny.SHAPE | shape))).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model


def under(base: Any, policy: Policy) -> TransformersModel:
    model = copy.deepcopy(base)
    policy.install(model)
    loaded = TransformersModel(model, "cpu")
    loaded.scoring = policy.scoring
    return loaded


def watched(model: TransformersModel) -> list[str]:
    """Grows with each call of the policy's own code: of an operator, of the cache that it made, or of its exits."""
    calls: list[str] = []
    for module in model.module.modules():
        if hasattr(module, "operator"):
            module.operator.register_forward_hook(lambda *_: calls.append("operator"))
    if isinstance(partial := getattr(model.module.base_model, "exits", getattr(model.module.base_model, "routed", None)), Partial):
        inner = partial.through

        def through(*given: Any) -> Any:
            for block in blocks_of(model.module).values():
                name = layout_of(block).mlp[0]
                handles.append(block.get_submodule(name).register_forward_hook(lambda *_: calls.append("block")))
            try:
                return inner(*given)
            finally:
                while handles:
                    handles.pop().remove()

        handles: list[Any] = []
        partial.through = through  # type: ignore[method-assign]
    elif not calls and model._new_cache() is not None:
        make = model._new_cache

        def made() -> Any:
            cache = make()
            update = cache.update

            def updated(*given: Any, **more: Any) -> Any:
                calls.append("cache")
                return update(*given, **more)

            cache.update = updated
            return cache

        model._new_cache = made
    return calls


def far(first: Tensor, second: Tensor) -> float:
    """Largest difference, relative to the largest logit."""
    return float((first - second).abs().max() / second.abs().max())
