"""The JSON of a stranger as plain data: no text in it moves a cursor, hides what stands beside it, or stops who writes it out.

A record may come from anybody, and its texts end in terminals, pages, spreadsheets and logs. They are cleaned here, once, instead of at
each of those ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pydantic_core import from_json

from slimbench.util.text import plain

_SUSPECT = re.compile(
    rb"\\[bfr]|\\u(?:00[01789]|200[ef]|202[89a-e]|206[6-9])|\x7f|\xc2[\x80-\x9f]|\xe2\x80[\x8e\x8f\xa8-\xae]|\xe2\x81[\xa6-\xa9]",
    re.IGNORECASE,
)
"""What no JSON without a text to clean holds: of files without it, which are nearly all, no text is looked at."""
_LONG_NUMBER = re.compile(rb"\d\.?e\+?\d{3,}[,\s\]}]|\d{100,}[,\s\]}]", re.IGNORECASE)
LARGEST = 1e150
"""No measurement gives a larger number, and the square of a larger one is infinite."""


def decode(content: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: It is no JSON, or holds half of a surrogate pair or a number above `LARGEST`.
    """
    data = from_json(content)
    if _LONG_NUMBER.search(content) and (number := next(_too_large(data), None)) is not None:
        raise ValueError(
            f"it holds {number:.3g}, which no measurement gives" if isinstance(number, float) else "it holds an endless number"
        )
    return _plain(data) if _SUSPECT.search(content) else data


def _too_large(value: Any) -> Iterator[float | int]:
    """The numbers of a value that are too large."""
    if isinstance(value, float | int) and abs(value) > LARGEST:
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _too_large(part)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, dict):
        return {plain(key): _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else value
