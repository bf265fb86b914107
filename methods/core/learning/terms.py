"""The parts of a loss, by name: a loss function says what is one, and the loop that trains hears how each goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_HEARD: ContextVar[dict[str, Tensor] | None] = ContextVar("terms", default=None)


def term(name: str, value: Tensor) -> Tensor:
    """The value, a scalar with the weight that it has in the loss; where it is heard, it is added to what has this name already."""
    heard = _HEARD.get()
    if heard is not None:
        heard[name] = heard.get(name, 0.0) + value.detach()
    return value


@contextmanager
def hearing() -> Iterator[dict[str, float]]:
    """The terms of the losses that are computed inside, in a mapping that is filled when it ends."""
    heard: dict[str, Tensor] = {}
    told: dict[str, float] = {}
    token = _HEARD.set(heard)
    try:
        yield told
    finally:
        _HEARD.reset(token)
        told |= {name: float(value) for name, value in heard.items()}
