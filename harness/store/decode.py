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
_HARMLESS = bytes(byte for byte in range(128) if byte not in b"\\\x7f")
_SHAPE = bytes.maketrans(b"123456789E", b"000000000e")  # every digit becomes 0
_LARGE_SHAPE = re.compile(rb"e\+?000+[,\s\]}]")
_LONG_SHAPE = b"0" * 100
LARGEST = 1e150
"""No measurement gives a larger number, and the square of a larger one is infinite."""


def decode(content: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: It is no JSON, or holds half of a surrogate pair or a number above `LARGEST`.
    """
    data = from_json(content)
    if _may_be_too_large(content) and (number := next(_too_large(data), None)) is not None:
        raise ValueError(
            f"it holds {number:.3g}, which no measurement gives" if isinstance(number, float) else "it holds an endless number"
        )
    return _plain(data) if _may_be_suspect(content) else data


def _may_be_suspect(content: bytes) -> bool:
    """Whether there may be a text to clean. Most files hold nothing but harmless bytes, which are passed over ten times as fast."""
    rest = content.translate(None, _HARMLESS)
    return bool(rest) and bool(_SUSPECT.search(content if b"\\" in rest else rest))


def _may_be_too_large(content: bytes) -> bool:
    """Whether there may be a number above `LARGEST`, told by the shape of the numbers: no number of most files is looked at."""
    shape = content.translate(_SHAPE)
    return _LONG_SHAPE in shape or bool(_LARGE_SHAPE.search(shape))


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
