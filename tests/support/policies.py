"""Models under a policy, and whether its own code ran."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.methods.formats.architecture.layout import layout_of
from slimbench.methods.formats.architecture.structure import blocks_of
from slimbench.methods.formats.attention.content import Routing
from slimbench.methods.formats.attention.entmax import Entmax
from slimbench.methods.formats.attention.latent import Latent
from slimbench.methods.formats.attention.linear import Linear
from slimbench.methods.formats.attention.policy import ALL
from slimbench.methods.formats.attention.pooled import Pooled
from slimbench.methods.formats.attention.span import Span
from slimbench.methods.formats.attention.vq import VQ
from slimbench.methods.formats.depth.router import Router
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


def fitted(layers: int, hidden: int, heads: int, groups: int) -> dict[str, Policy]:
    """Policies with tensors that methods fit to a model, here drawn, by the name of a method.

    Args:
        hidden: Width of a model whose heads are as wide as it is together.
        groups: Heads of keys and values.
    """

    def tensors(*size: int, names: tuple[str, ...], scale: float = 1.0) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(0)
        return {f"{layer}.{name}": torch.randn(size, generator=draw) * scale for layer in range(layers) for name in names}

    def each(name: str, value: Tensor) -> dict[str, Tensor]:
        return {f"{layer}.{name}": value.clone() for layer in range(layers)}

    width = hidden // heads
    which = torch.arange(heads) % 4
    spans, alphas = torch.tensor([0.0, 3.0, 7.25, 12.5])[which], torch.tensor([1.2, 1.5, 2.0, 1.8])[which]
    means = tensors(groups, 6, width, names=("means",))
    pairs, kept = torch.tensor([[0, 3], [1, 7]])[torch.arange(groups) % 2], groups * (2 * width - 4)
    latent = tensors(20, kept, names=("down",), scale=0.1) | tensors(kept, 20, names=("up",), scale=0.3)
    return {
        "skip-layer": Router(0.5, tensors(hidden, names=("weight",)) | each("bias", torch.zeros(1))),
        "linear-learned": Linear("hedgehog", 8, maps=tensors(heads, width, width, names=("query", "key"), scale=0.2)),
        "linformer": Pooled("projection", 8, 2, tensors(2, 8, names=("keys", "values"), scale=0.5)),
        "transformer-vq": VQ(8, tensors(groups, 16, width, names=("codes",))),
        "routing-transformer": Routing(6, {name.partition(".")[0]: functional.normalize(own, dim=-1) for name, own in means.items()}),
        "adaptive-span": Span(4, each("span", spans)),
        "entmax": Entmax(each("alpha", alphas)),
        "latent-attention": Latent(20, 2, each("pairs", pairs) | latent),
    }


def as_long_as(policy: Policy, tokens: int) -> Policy | None:
    """A policy that leaves nothing out of a text of so many tokens, by what it does to any text; None where it takes no such length."""
    neutral: Any = policy.neutral()
    endless = [field.name for field in fields(neutral) if getattr(neutral, field.name) == ALL]
    try:
        return replace(neutral, **dict.fromkeys(endless, tokens)) if endless else None
    except ValueError:
        return None


def under(base: Any, policy: Policy) -> TransformersModel:
    model = copy.deepcopy(base)
    policy.install(model)
    loaded = TransformersModel(model, "cpu")
    loaded.scoring = policy.scoring
    return loaded


def watched(model: TransformersModel) -> list[str]:
    """Grows with each call of the policy's own code: of an operator, of the cache that it made, or of its base."""
    calls: list[str] = []
    for module in model.module.modules():
        if hasattr(module, "operator"):
            module.operator.register_forward_hook(lambda *_: calls.append("operator"))
    partial = next((part for part in model.module.base_model.children() if isinstance(part, Partial)), None)
    if partial is not None:
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
