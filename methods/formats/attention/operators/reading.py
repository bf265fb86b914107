"""What a prompt leaves in a model before its policy decides what of that stays: one pass over it then serves many policies."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from slimbench.methods.formats.attention.operators.interface import KeptCache, Operator, attentions


def operators(model: Any) -> list[Operator]:
    """Those of the layers of a model, if each of them decides after a prompt; none otherwise."""
    every = [getattr(attention, "operator", None) for attention in attentions(model)]
    deciding = [operator for operator in every if isinstance(operator, Operator) and operator.decides_after]
    return deciding if len(deciding) == len(every) else []


def ask(cache: KeptCache) -> None:
    """Let the prompt that comes next leave its reading in the layers of an empty cache."""
    for layer in cache.kept:
        layer.reading = {}


def take(cache: KeptCache) -> dict[str, Tensor]:
    """That reading, as `LAYER.NAME`; the cache holds it no longer."""
    found: dict[str, Tensor] = {}
    for index, layer in enumerate(cache.kept):
        found |= {f"{index}.{name}": tensor for name, tensor in (layer.reading or {}).items()}
        layer.reading = None
    return found


def decide(model: Any, cache: KeptCache, reading: dict[str, Tensor], tokens: int) -> None:
    """Put into an empty cache what a prompt of so many tokens, of which this is the reading, leaves under the policy of a model."""
    for index, (operator, layer) in enumerate(zip(operators(model), cache.kept, strict=True)):
        prefix = f"{index}."
        layer.seen, layer.is_initialized = tokens, True
        operator.decide({name.removeprefix(prefix): tensor for name, tensor in reading.items() if name.startswith(prefix)}, layer)
