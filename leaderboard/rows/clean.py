"""Values as a page or a table may show them."""

from __future__ import annotations

import math
import re
from typing import Any

from slimbench.util.text import plain

_BREAKS = re.compile(r"[\n\t]+")


def clean(value: Any) -> Any:
    """The same value with non-finite numbers as None and each text on one line, without control characters."""
    kind = type(value)
    if value is None or kind is int or kind is bool:
        return value
    if kind is float:
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value if _plain(value) else _BREAKS.sub(" ", plain(value))
    if kind is dict:
        return {k if type(k) is str and _plain(k) else clean(k): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    return value


def _plain(text: str) -> bool:
    return text.isascii() and text.isprintable()
