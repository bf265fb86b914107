"""Functions with one piece of their text changed, which the tests of what they compute must notice."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any


def mutant(function: Callable[..., Any], piece: str, other: str) -> Callable[..., Any]:
    """The function with a piece of its source, which stands there once, in another form; it has no closure and no `super()`."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(piece) == 1, f"'{piece}' stands {source.count(piece)} times in {function.__qualname__}"
    names: dict[str, Any] = {}
    exec(compile(source.replace(piece, other), f"<{function.__qualname__} with {other}>", "exec"), function.__globals__, names)
    return names[function.__name__]
