"""Who taught, and from what a training began: hashes of parameters that stand in a claim, so that a record can prove both.

A loss asks its teacher, and the loop that trains hears whom it asked, as it hears the terms of a loss (`core.learning.terms`). What is
hashed are the names, shapes, dtypes and bytes of all parameters, in the order of their names; buffers are not.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.base import DenseModel

FIRST = "the model that the pipeline began with"
"""A teacher in the words of a claim."""

_ASKED: ContextVar[dict[str, Any] | None] = ContextVar("teachers", default=None)


def fingerprint(parameters: Mapping[str, Tensor]) -> str:
    """SHA-256 of parameters by name."""
    digest = hashlib.sha256()
    for name in sorted(parameters):
        value = parameters[name]
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(raw(value))
    return digest.hexdigest()


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, as a hash takes them."""
    import torch

    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def teacher_of(dense: DenseModel) -> Any:
    """The model that the pipeline began with, in its own dtype and frozen; whoever is `watching` hears when it is asked."""
    return heard(dense.load_original())


def heard(model: Any) -> Any:
    """A model that teaches, frozen; whoever is `watching` hears when it is asked."""
    model.requires_grad_(False)
    loaded, kept = fingerprint(dict(model.named_parameters())), weakref.ref(model)

    def told(*_: Any) -> None:
        asked = _ASKED.get()
        if asked is not None:
            asked[loaded] = kept()

    model.base_model.register_forward_pre_hook(told)
    return model


@contextmanager
def watching() -> Iterator[dict[str, Any]]:
    """The teachers that are asked inside, by their fingerprint when they were loaded.

    Raises:
        RuntimeError: One of them has other parameters in the end.
    """
    asked: dict[str, Any] = {}
    token = _ASKED.set(asked)
    try:
        yield asked
    finally:
        _ASKED.reset(token)
    for loaded, model in asked.items():
        if fingerprint(dict(model.named_parameters())) != loaded:
            raise RuntimeError("the teacher changed: its parameters are not those that were loaded")
