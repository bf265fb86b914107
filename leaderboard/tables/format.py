"""How values are written in tables and on pages."""

from __future__ import annotations

import re
from dataclasses import dataclass

EMPTY = "–"


@dataclass(frozen=True)
class decimal:
    """A formatter with so many digits, one less from 100 on and none from 1000 on; beyond a million, powers of ten.

    What rounds to zero has no sign.
    """

    digits: int
    scale: float = 1.0
    signed: bool = False

    def __call__(self, value: float) -> str:
        value *= self.scale
        size = abs(value)
        if size >= 1e6:
            text = f"{value:.1e}".replace("e+0", "e").replace("e+", "e")
        else:
            digits = 0 if size >= 1000 else self.digits - 1 if size >= 100 and self.digits else self.digits
            text = f"{value:.{digits}f}"
        if not text.strip("-0."):
            return text.removeprefix("-")
        if text[0] == "-":
            return f"−{text[1:]}"
        return f"+{text}" if self.signed else text


def p_value(value: float) -> str:
    """A p-value with two digits; `< 0.001` below that."""
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def p_text(value: float) -> str:
    """`p = 0.03`, or `p < 0.001`."""
    return f"p {p_value(value)}" if value < 0.001 else f"p = {p_value(value)}"


def escape(text: str) -> str:
    """Text that Markdown shows as it is, cut to a line that can be read."""
    return re.sub(r"([\\`*_{}\[\]<>()#|~&])", r"\\\1", shorten(text, 300))


def shorten(text: str, length: int) -> str:
    """The text, or its beginning and an ellipsis where it is longer than `length` characters."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
